"""Mail that Zulip accepted and then failed to post.

When Zulip's worker fails with a mail (redis down, a stale database connection),
it appends date, TAB and a JSON list of the mails to email_mirror.errors and does
nothing more with them. Each is handed over again, once; one that fails twice goes
into the quarantine. The position in the file is kept in a state of its own, so a line
is never taken up twice, nor forgotten; what stood there before the gateway was installed
is not touched at all.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterator
from typing import Any

from .addresses import redact
from .delivery import OTHER_PATTERN, Envelope, Gateway
from .headers import without_zulips_headers
from .verdict import Deferred, Refused, Trouble

# How many handed-over-again mails to remember (hashes of 64 hex digits).
_REMEMBERED = 10000


class Recovery:
    """Reads the file of failures on behalf of `gateway`."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._path = gateway.config.queue_errors

    def run(self) -> list[str]:
        """Hand over again what has failed since the last run.

        Returns a line for each mail taken up. Raises Trouble when the file can
        not be read or the mail can not be handed over now: the next run goes on
        from there.
        """
        inode, size = self._stat()
        beginning = {"inode": inode, "offset": size, "done": 0, "again": [], "counts": {}}
        with self._gateway.recovered.change() as data:
            recovery = data.setdefault("recovery", beginning)
            if inode and (inode != recovery["inode"] or size < recovery["offset"]):
                recovery.update(inode=inode, offset=0, done=0)  # a new file
        told = []
        # How many mails of the first line are done, if the last run ended in the middle of it.
        done = recovery["done"]
        for line, end in self._lines(recovery):
            told += [self._again(mail) for mail in _mails(line)[done:]]
            done = 0
            with self._gateway.recovered.change() as data:
                data["recovery"].update(offset=end, done=0)
        return told

    def _again(self, mail: dict[str, Any]) -> str:
        recipient, encoded = mail["rcpt_to"], mail["msg_base64"]
        # Zulip adds the missing padding itself before it decodes; so do we.
        try:
            message = base64.b64decode(encoded + "=" * (-len(encoded) % 4))
        except ValueError:
            message = encoded.encode()  # as it is: more can not be saved
        # Zulip 11's server has added fields, X-Peer with another port each time.
        message = without_zulips_headers(message)
        mark = hashlib.sha256(recipient.encode() + b"\0" + message).hexdigest()
        seen = self._gateway.recovered.look()["recovery"]["again"]
        if mark in seen:
            return self._give_up(recipient, message, "Zulip failed twice to post it")
        verdict = self._gateway.deliver(Envelope(recipient), message, keep_refused=False)
        if isinstance(verdict, Refused) or (isinstance(verdict, Deferred) and verdict.cause == OTHER_PATTERN):
            return self._give_up(recipient, message, f"Zulip failed to post it, and now: {verdict.reason}")
        if isinstance(verdict, Deferred):
            raise Trouble(*verdict[:3])
        self._note("handed over again", mark)
        return f"mail of {len(message)} bytes for {redact(recipient)}: failed inside Zulip, handed over again"

    def _give_up(self, recipient: str, message: bytes, why: str) -> str:
        """Into the quarantine, to stay there: Zulip had accepted it, so nobody was told."""
        self._gateway.quarantine.keep(message, recipient, "", "", why, lost=True)
        self._note("quarantined")
        return f"mail of {len(message)} bytes for {redact(recipient)}: now in quarantine: {redact(why)}"

    def _note(self, outcome: str, mark: str | None = None) -> None:
        """All at one stroke: a mail that is marked is never taken up from the same line again."""
        with self._gateway.recovered.change() as data:
            recovery = data["recovery"]
            recovery["counts"][outcome] = recovery["counts"].get(outcome, 0) + 1
            recovery["done"] += 1
            if mark is not None:
                recovery["again"] = [*recovery["again"], mark][-_REMEMBERED:]

    def _lines(self, recovery: dict[str, Any]) -> Iterator[tuple[bytes, int]]:
        """Complete lines after the known position, with the position behind each."""
        try:
            file = open(self._path, "rb")  # noqa: SIM115 - closed below
        except FileNotFoundError:
            return
        except OSError as error:
            raise self._unreadable(error) from error
        with file:
            if os.fstat(file.fileno()).st_ino != recovery["inode"]:
                return  # replaced just now
            file.seek(recovery["offset"])
            while (line := file.readline()).endswith(b"\n"):
                yield line, file.tell()

    def _stat(self) -> tuple[int, int]:
        """Inode and size (bytes); 0 while there is no such file."""
        try:
            status = self._path.stat()
        except FileNotFoundError:
            return 0, 0
        except OSError as error:
            raise self._unreadable(error) from error
        return status.st_ino, status.st_size

    def _unreadable(self, error: OSError) -> Trouble:
        reason = f"cannot read {self._path}: {error.strerror}; the gateway's user has to be able to"
        return Trouble("4.3.0", "recovery", reason)


def _mails(line: bytes) -> list[dict[str, Any]]:
    """The mails of one line; an unreadable line has none."""
    try:
        found = json.loads(line.partition(b"\t")[2])
    except ValueError:
        return []
    mails = found if isinstance(found, list) else [found]
    return [
        mail
        for mail in mails
        if isinstance(mail, dict) and isinstance(mail.get("rcpt_to"), str) and isinstance(mail.get("msg_base64"), str)
    ]
