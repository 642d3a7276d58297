"""Mail that Zulip accepted and then failed to post.

When Zulip's worker fails with a mail (redis down, a stale database connection),
it appends date, TAB and a JSON list of the mails to email_mirror.errors and does
nothing more with them. Each is handed over again, once; one that fails twice goes
into the quarantine. How far the file was read stands in the journal, so a line is never
taken up twice, nor forgotten; what stood there before the gateway was installed is not
touched at all.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from .addresses import redact
from .gateway import OTHER_PATTERN, Envelope, Gateway
from .journal import Mail, add_to_count, key_of
from .message import Message, stored
from .verdict import Deferred, Refused, Trouble

# The message in a line, long as it may be, is taken out before the line is parsed.
_MESSAGE = re.compile(rb'"msg_base64": *"([^"\\]*)("|\n|\Z)')
# Where a line begins that was written behind a torn one: date (ctime(3)), TAB, list.
_BEGIN = re.compile(rb"[A-Z][a-z]{2} [A-Z][a-z]{2} [ \d]\d [\d:]{8} \d{4}\t(?=\[)")
_RECIPIENT = re.compile(rb'"rcpt_to": *"([^"\\]*)"')


class Failed(NamedTuple):
    """A mail of the file; torn: only its beginning was written."""

    recipient: str
    message: bytes
    torn: bool = False


class Failures:
    """Reads the file on behalf of `gateway`."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._journal = gateway.journal
        self._path = gateway.config.queue_errors

    def run(self) -> list[str]:
        """Hand over again what has failed since the last run.

        Returns a line for each mail taken up. Raises Trouble when the file cannot be read
        or the mail cannot be handed over now: the next run goes on from there.
        """
        inode, size = self._stat()
        position = self._journal.note("failures")
        if position is None or (inode and (inode != position["inode"] or size < position["offset"])):
            # What is there at first is none of ours; a new file is read from its beginning.
            position = {"inode": inode, "offset": size if position is None else 0}
            self._write(position)
        told = []
        for line, end in self._lines(position) if size > position["offset"] else ():
            for number, failed in enumerate(_mails(line)):
                # By its place in the file: taken up once, whatever ends the program.
                told += self._again(failed, (str(position["inode"]), str(position["offset"]), str(number)))
            position = {"inode": inode, "offset": end}
            self._write(position)
        return told

    def _write(self, position: dict[str, Any]) -> None:
        with self._journal.change(sync=True) as database:
            self._journal.write_note(database, "failures", position)

    def _again(self, failed: Failed, place: tuple[str, ...]) -> list[str]:
        try:
            with stored(self._gateway.spool) as file:
                file.write(failed.message)
                file.flush()
                # Zulip 11's server has added fields, X-Peer with another port each time.
                message = Message(file).without_reserved_fields(self._gateway.spool)
                outcome = self._one_more(failed, place, message)
        except OSError as error:
            raise Trouble("4.3.0", "spool", f"cannot store a message: {error.strerror}") from error
        return [f"mail of {message.size} bytes for {redact(failed.recipient)}: {outcome}"] if outcome else []

    def _one_more(self, failed: Failed, place: tuple[str, ...], message: Message) -> str:
        """What became of it; empty if it was taken up before."""
        mark = mark_of(failed.recipient, message)
        envelope = Envelope(failed.recipient, "", mark, "zulip", ("zulip", *place))
        key = key_of(*envelope.known_by, message.digest())
        mail = Mail(key, "zulip", failed.recipient, "", mark, message.size)
        if self._journal.verdict(key):
            return ""
        if failed.torn:
            return self._give_up(mail, message, "Zulip failed to post it, and wrote down only its beginning")
        if self._journal.was_handed_over_again(mark):
            return self._give_up(mail, message, "Zulip failed twice to post it")
        verdict = self._gateway.deliver(envelope, message, keep_refused=False)
        if isinstance(verdict, Refused) or (isinstance(verdict, Deferred) and verdict.cause == OTHER_PATTERN):
            return self._give_up(mail, message, f"Zulip failed to post it, and now: {verdict.reason}")
        if isinstance(verdict, Deferred):
            raise Trouble(*verdict[:3])
        self._count("handed over again")
        return "failed inside Zulip, handed over again"

    def _give_up(self, mail: Mail, message: Message, why: str) -> str:
        """Into the quarantine, to stay there: Zulip had accepted it, so nobody was told."""
        copy = self._gateway.quarantine.store(message, mail, why, lost=True)
        with self._journal.change(sync=True) as database:
            self._journal.finish(database, mail, Refused("5.3.0", "lost in Zulip", why), copy, lost=True)
        self._count("quarantined")
        return f"now in quarantine: {redact(why)}"

    def _count(self, outcome: str) -> None:
        with self._journal.change() as database:
            add_to_count(database, "failed inside zulip", outcome)

    def _lines(self, position: dict[str, Any]) -> Iterator[tuple[bytes, int]]:
        """Complete lines after the known position, with the position behind each."""
        try:
            file = open(self._path, "rb")  # noqa: SIM115 - closed below
        except FileNotFoundError:
            return
        except OSError as error:
            raise self._unreadable(error) from error
        with file:
            if os.fstat(file.fileno()).st_ino != position["inode"]:
                return  # replaced just now
            file.seek(position["offset"])
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
        return Trouble("4.3.0", "failures", reason)


def mark_of(recipient: str, message: Message) -> str:
    """By this a mail is known again that fails once more."""
    digest = hashlib.sha256(recipient.encode() + b"\0")
    for piece in message.pieces():
        digest.update(piece)
    return digest.hexdigest()


def _mails(line: bytes) -> Iterator[Failed]:
    """The mails of one line, and of torn ones (the disk was full) that it goes on behind."""
    begins = [match.start() for match in _BEGIN.finditer(line)] or [0]
    for begin, end in zip(begins, [*begins[1:], len(line)], strict=True):
        messages: list[bytes] = []

        def taken_out(match: re.Match[bytes], messages: list[bytes] = messages) -> bytes:
            messages.append(match[1])
            return b'"msg_base64": "%d%s' % (len(messages) - 1, match[2])

        entry = _MESSAGE.sub(taken_out, line[begin:end])
        try:
            found = json.loads(entry.partition(b"\t")[2])
        except ValueError:
            recipient = _RECIPIENT.search(entry)
            if recipient and messages:
                yield Failed(recipient[1].decode("utf-8", "replace"), _decoded(messages[-1]), torn=True)
            continue
        for mail in found if isinstance(found, list) else [found]:
            if isinstance(mail, dict) and isinstance(mail.get("rcpt_to"), str) and messages:
                number = str(mail.get("msg_base64"))
                if number.isdigit() and int(number) < len(messages):
                    yield Failed(mail["rcpt_to"], _decoded(messages[int(number)]))


def _decoded(encoded: bytes) -> bytes:
    """Zulip adds the missing padding itself before it decodes; so do we."""
    for padding in (-len(encoded) % 4, 3):
        try:
            return base64.b64decode(encoded + b"=" * padding)
        except ValueError:
            continue
    return encoded  # as it is: more cannot be saved
