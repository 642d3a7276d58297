"""Mail that Zulip accepted and then failed to post.

When Zulip's worker fails with a mail (redis down, a stale database connection),
it appends date, TAB and a JSON list of the mails to email_mirror.errors and does
nothing more with them. Most are ours and under way, so that their outcome is taken care of
(outcome.py). Each of the others is handed over again, once; one that fails twice goes
into the quarantine. What stood there before the gateway was installed is not touched.

How far the file was read stands in a file of its own, so that it is known though the
journal may be lost. Within a line the journal knows each mail by its place.
"""

from __future__ import annotations

import binascii
import calendar
import hashlib
import json
import mmap
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from . import files
from .addresses import redact
from .gateway import OTHER_PATTERN, Envelope, Gateway
from .journal import FAILED_INSIDE, POSITION, Mail, add_to_count, address_of, key_of
from .message import Message, stored
from .verdict import WAITING, Deferred, Delivered, Refused, Trouble

# The message in a line, long as it may be, is taken out before the line is parsed.
_MESSAGE = re.compile(rb'"msg_base64": *"([^"\\\n]*)("|\n|\Z)')
# Where a line begins that was written behind a torn one: date (ctime(3)), TAB, list.
_BEGIN = re.compile(rb"[A-Z][a-z]{2} [A-Z][a-z]{2} [ \d]\d [\d:]{8} \d{4}\t(?=\[)")
_RECIPIENT = re.compile(rb'"rcpt_to": *"([^"\\]*)"')
# Decoded at a time: a multiple of four (bytes).
_PIECE = 2**18
# Others wait for this one to end: seconds for Zulip's rate limit.
_MAX_WAIT = 5.0
# So many bytes of the file, and what completes a line, are copied at a time. A line is not longer than
# _LONGEST: base64 of the largest mail that Zulip takes.
_AT_A_TIME, _LONGEST = 2**25, 2**26


class Failed(NamedTuple):
    """A mail of the file. when: it failed (Unix seconds); begin, end: where its base64 stands; torn: only
    its beginning was written."""

    when: float
    recipient: str
    begin: int
    end: int
    torn: bool = False


class Failures:
    """Reads the file on behalf of `gateway`."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._journal = gateway.journal
        self._path = gateway.config.queue_errors
        self._position = gateway.config.state_dir / POSITION

    def run(self) -> tuple[list[str], Deferred | None]:
        """Hand over again what has failed since the last run.

        Returns a line for each mail taken up, and why others could not be handed over now:
        the next run tries them again. Raises Trouble when the file cannot be read.
        """
        inode, size = self._stat()
        position = self._read_position() or {"inode": inode, "offset": size, "generation": 0}
        told: list[str] = []
        waits: Deferred | None = None
        if inode and (inode != position["inode"] or size < position["offset"]):
            former = self._renamed(position["inode"])
            if former is not None:  # its last lines may not have been read
                told, waits, position = self._read(former, position)
                if waits:
                    return told, waits
            position = {"inode": inode, "offset": 0, "generation": position["generation"] + 1}
        if size > position["offset"]:
            more, waits, position = self._read(self._path, position)
            told += more
        self._write_position(position)
        return told, waits

    def _read(self, path: Path, position: dict[str, int]) -> tuple[list[str], Deferred | None, dict[str, int]]:
        """Take up the complete lines behind the position; the position behind those that are done."""
        told: list[str] = []
        waits: Deferred | None = None
        offset = position["offset"]
        # In pieces of a copy of our own: Zulip's file may be emptied while it is read.
        while (copy := self._copy(path, position["inode"], offset)) is not None:
            with copy, mmap.mmap(copy.fileno(), 0, access=mmap.ACCESS_READ) as text:
                begin = 0
                while (end := text.find(b"\n", begin) + 1) > 0:
                    for number, failed in enumerate(_mails(text, begin, end)):
                        place = (str(position["generation"]), str(offset + begin), str(number))
                        outcome = self._again(text, failed, place)
                        told += [outcome] if isinstance(outcome, str) and outcome else []
                        waits = outcome if isinstance(outcome, Deferred) else waits
                    begin = end
                    if waits is None:
                        position = {**position, "offset": offset + end}
                        self._write_position(position)
            offset += begin
        return told, waits, position

    def _copy(self, path: Path, inode: int, offset: int) -> BinaryIO | None:
        """The next complete lines of the file behind `offset`; None if there are none."""
        copy, ends = stored(self._gateway.spool), False
        try:
            with files.opened(path) as file:
                if os.fstat(file.fileno()).st_ino != inode:
                    return None  # replaced just now
                file.seek(offset)
                while (piece := file.read(_PIECE)) and not (ends and copy.tell() > _AT_A_TIME):
                    copy.write(piece)
                    ends = ends or b"\n" in piece
                    if not ends and copy.tell() > _LONGEST:
                        raise self._without_end(path, offset)
                copy.flush()
        except OSError as error:
            raise self._unreadable(error) from error
        return copy if ends else None

    def _without_end(self, path: Path, offset: int) -> Trouble:
        what = f"{path} has a line of more than {_LONGEST} bytes behind byte {offset}, which no mail makes"
        return Trouble("4.3.0", "failures", f"{what}; look at it, then remove it")

    def _again(self, text: mmap.mmap, failed: Failed, place: tuple[str, ...]) -> str | Deferred:
        """Hand one mail over again; what became of it, empty if it was taken up before."""
        try:
            with stored(self._gateway.spool) as file:
                _decode(text, failed, file)
                if not file.tell() and not failed.torn:
                    return ""  # a question (questions.py)
                # Zulip 11's server has added fields, X-Peer with another port each time.
                message = Message(file).without_reserved_fields(self._gateway.spool)
                outcome = self._one_more(failed, place, message)
        except OSError as error:
            raise Trouble("4.3.0", "spool", f"cannot store a message: {error.strerror}") from error
        if isinstance(outcome, Deferred) or not outcome:
            return outcome
        return f"mail of {message.size} bytes for {redact(failed.recipient)}: {outcome}"

    def _one_more(self, failed: Failed, place: tuple[str, ...], message: Message) -> str | Deferred:
        mark = mark_of(failed.recipient, message)
        envelope = Envelope(failed.recipient, "", mark, "zulip", ("zulip", *place))
        key = key_of(*envelope.known_by, message.digest())
        mail = Mail(key, "zulip", failed.recipient, "", mark, message.size)
        if self._journal.verdict(key):
            return ""
        address = address_of(self._gateway.config.addresses.token_of(failed.recipient))
        is_under_way = self._gateway.outcomes.flight(key) is not None  # it was handed over again before
        if not is_under_way and self._gateway.outcomes.has_failed(address, failed.when):
            with self._journal.change() as database:
                self._journal.finish(database, mail, Delivered("taken care of", WAITING))
            return ""
        if failed.torn:
            return self._give_up(mail, message, "Zulip failed to post it, and wrote down only its beginning")
        if self._journal.was_handed_over_again(mark):
            return self._give_up(mail, message, "Zulip failed twice to post it")
        verdict = self._gateway.deliver(envelope, message, max_wait=_MAX_WAIT, keep_refused=False)
        if isinstance(verdict, Refused) or (isinstance(verdict, Deferred) and verdict.cause == OTHER_PATTERN):
            return self._give_up(mail, message, f"Zulip failed to post it, and now: {verdict.reason}")
        if isinstance(verdict, Deferred):
            return verdict
        self._count("handed over again")
        return "failed inside Zulip, handed over again"

    def _give_up(self, mail: Mail, message: Message, why: str) -> str:
        """Into the quarantine, to stay there: Zulip had accepted it, so nobody was told."""
        copy = self._gateway.quarantine.store(message, mail, why, lost=True)
        try:
            with self._journal.change(sync=True) as database:
                self._journal.finish(database, mail, Refused("5.3.0", "lost in Zulip", why), copy, lost=True)
        except Trouble:
            self._gateway.quarantine.discard(copy)
            raise
        self._count("quarantined")
        return f"now in quarantine: {redact(why)}"

    def _count(self, outcome: str) -> None:
        with self._journal.change() as database:
            add_to_count(database, FAILED_INSIDE, outcome)

    def _read_position(self) -> dict[str, int] | None:
        try:
            with files.opened(self._position) as file:
                found = json.loads(file.read(_PIECE))
            return {name: int(found[name]) for name in ("inode", "offset", "generation")}
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        except OSError as error:
            raise Trouble("4.3.0", "failures", f"cannot read {self._position}: {error.strerror}") from error

    def _write_position(self, position: dict[str, Any]) -> None:
        if position == self._read_position():
            return
        try:
            files.write(self._position, [json.dumps(position).encode()])
        except OSError as error:
            raise Trouble("4.3.0", "failures", f"cannot write {self._position}: {error.strerror}") from error

    def _renamed(self, inode: int) -> Path | None:
        """Where the file that was read has gone, as after a rotation."""
        for path in self._path.parent.glob(f"{self._path.name}?*"):
            if path.lstat().st_ino == inode:
                return path
        return None

    def _stat(self) -> tuple[int, int]:
        """Inode and size (bytes); 0 while there is no such file."""
        try:
            status = files.status_of(self._path)
        except FileNotFoundError:
            return 0, 0
        except OSError as error:
            raise self._unreadable(error) from error
        return status.st_ino, status.st_size

    def _unreadable(self, error: OSError) -> Trouble:
        what = f"cannot read {self._path}: {error.strerror}"
        return Trouble("4.3.0", "failures", f"{what}; the gateway's user has to be able to")


def mark_of(recipient: str, message: Message) -> str:
    """By this a mail is known again that fails once more."""
    digest = hashlib.sha256(recipient.encode() + b"\0")
    for piece in message.pieces():
        digest.update(piece)
    return digest.hexdigest()


def _mails(text: mmap.mmap, begin: int, end: int) -> Iterator[Failed]:
    """The mails of one line, and of torn ones (the disk was full) that it goes on behind."""
    begins = [match.start() for match in _BEGIN.finditer(text, begin, end)] or [begin]
    for start, stop in zip(begins, [*begins[1:], end], strict=True):
        messages = [match.span(1) for match in _MESSAGE.finditer(text, start, stop)]
        entry, place = b"", start
        for number, (message_begin, message_end) in enumerate(messages):
            entry += text[place:message_begin] + b"%d" % number
            place = message_end
        entry += text[place:stop]
        when = _time(entry)
        try:
            found = json.loads(entry.partition(b"\t")[2])
        except (ValueError, RecursionError):
            recipient = _RECIPIENT.search(entry)
            if recipient and messages:
                yield Failed(when, recipient[1].decode("utf-8", "replace"), *messages[-1], torn=True)
            continue
        for mail in found if isinstance(found, list) else [found]:
            if isinstance(mail, dict) and isinstance(mail.get("rcpt_to"), str):
                number_of = str(mail.get("msg_base64"))
                if number_of.isdecimal() and int(number_of) < len(messages):
                    yield Failed(when, mail["rcpt_to"], *messages[int(number_of)])


def _time(entry: bytes) -> float:
    """When it was written (ctime(3)), in UTC, which is TIME_ZONE on every Zulip server; 0 if it does not say."""
    try:
        return calendar.timegm(time.strptime(entry.partition(b"\t")[0].decode("ascii")))
    except ValueError:
        return 0.0


def _decode(text: mmap.mmap, failed: Failed, file: BinaryIO) -> None:
    """Write the message, decoded in pieces. What is no base64 is written as it is: more cannot be saved."""
    try:
        for begin in range(failed.begin, failed.end, _PIECE):
            piece = text[begin : min(begin + _PIECE, failed.end)]
            # Zulip adds the missing padding itself before it decodes; so do we. One character
            # too many, where the line was torn, means nothing.
            piece = piece[:-1] if len(piece) % 4 == 1 else piece
            file.write(binascii.a2b_base64(piece + b"=" * (-len(piece) % 4)))
    except binascii.Error:
        file.seek(0)
        file.truncate()
        for begin in range(failed.begin, failed.end, _PIECE):
            file.write(text[begin : min(begin + _PIECE, failed.end)])
    file.flush()
