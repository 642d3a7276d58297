"""Copies of refused mail, so that a refusal can be looked into and undone.

A file each, ``ID.mail``: a line of JSON with envelope, time and reason, then the message as
it came. The journal has their index; should it be lost, the first lines tell it again. Only
root and the gateway can read them. The size of all of refused mail is bounded, and their age; what
Zulip has accepted and lost has a bound of its own, and goes by no age.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from . import files
from .addresses import redact
from .journal import Copy, Journal, Mail, disk_space
from .message import Message, stored
from .verdict import Trouble, one_line

FOLDER = "quarantine"
SUFFIX = ".mail"
# So many are removed at a time at most.
_AT_A_TIME = 200
# The longest first line there can be (bytes).
_MAX_ENVELOPE = 2**16
# The alarm is raised when lost mail takes up this part of its bound, and names so many.
ALARM, NAMED = 0.8, 5
# Seconds from the alarm until the first one goes. The name of the journal's note of it.
_NOTICE, _ALARMED = 86400.0, "lost mail"


class Quarantine:
    """The folder with the copies; every fault is raised as Trouble."""

    def __init__(self, state_dir: Path, journal: Journal, max_bytes: int, max_days: float) -> None:
        self.folder = state_dir / FOLDER
        self._journal = journal
        self._max_bytes = max_bytes
        self._max_age = max_days * 86400
        # What all copies of refused mail take on the disk (bytes), once they were added up.
        self._bytes: int | None = None

    def store(self, message: Message, mail: Mail, reason: str, lost: bool = False) -> str:
        """Store a copy and return its id; to be written into the journal next."""
        now = time.time()
        name = time.strftime("%Y%m%dT%H%M%S", time.gmtime(now)) + "-" + secrets.token_hex(4)
        copy = Copy(name, mail.recipient, mail.sender, mail.queue_id, reason, now, message.size, lost)
        self.write(copy, message.pieces())
        return name

    def write(self, copy: Copy, pieces: Iterable[bytes]) -> None:
        """Write a copy to the disk."""
        envelope = json.dumps(copy._asdict()).encode() + b"\n"
        try:
            self.folder.mkdir(mode=0o700, exist_ok=True)
            files.write(self.path(copy.id), _all(envelope, pieces))
        except OSError as error:
            what = f"cannot keep a copy in {self.folder}: {error.strerror}"
            raise Trouble("4.3.0", "quarantine", f"{what}; look at its free space") from error

    def discard(self, name: str) -> None:
        """Remove a copy that the journal does not know."""
        with suppress(OSError):
            self.path(name).unlink()

    def path(self, name: str) -> Path:
        """The file of a copy."""
        return self.folder / f"{name}{SUFFIX}"

    def pieces(self, name: str) -> Iterator[bytes]:
        """The message as it came."""
        try:
            with files.opened(self.path(name)) as file:
                yield from Message(file).pieces(len(file.readline(_MAX_ENVELOPE)))
        except OSError as error:
            raise Trouble("4.3.0", "quarantine", f"cannot read {self.path(name)}: {error.strerror}") from error

    def message(self, name: str, spool: Path) -> Message:
        """The message as it came, in a file in `spool`."""
        try:
            draft = stored(spool)
            for piece in self.pieces(name):
                draft.write(piece)
            draft.flush()
        except OSError as error:
            raise Trouble("4.3.0", "spool", f"cannot store a message in {spool}: {error.strerror}") from error
        return Message(draft)

    def remove(self, name: str) -> None:
        """Forget a copy for good."""
        self._journal.forget_copy(name)
        with suppress(FileNotFoundError):
            self.path(name).unlink()

    def purge(self, older_than_days: float, lost_too: bool = False) -> int:
        """Remove what was refused longer ago than that; how many.

        lost_too: also what Zulip has accepted and lost, of which there is no other copy.
        """
        moment, number = time.time() - older_than_days * 86400, 0
        for copy in self._journal.copies():
            if copy.refused <= moment and not copy.waits and (lost_too or not copy.lost):
                self.remove(copy.id)
                number += 1
        return number

    def grew(self, size: int) -> None:
        """Keep the copies within bounds after one more, of so many bytes; costs the same for any number."""
        self._bytes = self._journal.copied_bytes() if self._bytes is None else self._bytes + disk_space(size)
        self._shrink()

    def tidy(self) -> None:
        """Remove the oldest until size and age are within bounds; the newest goes by age only."""
        now = time.time()
        for copy in self._journal.copies_refused_before(now - self._max_age, _AT_A_TIME):
            self.remove(copy.id)
        self._bytes = self._journal.copied_bytes()
        self._shrink()

    def tidy_lost(self) -> list[str]:
        """Keep what Zulip has lost within its bound; what the operator has to be told."""
        told: list[str] = []
        now, size = time.time(), self._journal.lost_bytes()
        alarmed = self._journal.note(_ALARMED)
        if size <= ALARM * self._max_bytes:
            self._note_alarm(None, alarmed)
            return told
        # What an alarm has named goes after a day; sooner only where there would be no end of it.
        most = self._max_bytes if alarmed and now - alarmed["first"] > _NOTICE else 2 * self._max_bytes
        oldest = self._journal.lost_copies(_AT_A_TIME)
        for copy in oldest[:-1]:
            if size <= most:
                break
            told.append(f"removed for want of space: {described(copy)}")
            self.remove(copy.id)
            size -= disk_space(copy.size)
        if not alarmed or now - alarmed["last"] > _NOTICE:
            named = [described(copy) for copy in oldest[len(told) :][:NAMED]]
            told.insert(0, alarm(size, self._max_bytes, named))
            self._note_alarm({"first": alarmed["first"] if alarmed else now, "last": now}, alarmed)
        return told

    def _note_alarm(self, alarmed: dict[str, float] | None, before: dict[str, float] | None) -> None:
        if alarmed != before:
            with self._journal.change() as database:
                self._journal.write_note(database, _ALARMED, alarmed)

    def _shrink(self) -> None:
        if (self._bytes or 0) <= self._max_bytes:
            return
        for copy in self._journal.copies_refused_before(time.time(), _AT_A_TIME)[:-1]:
            self.remove(copy.id)
            self._bytes = (self._bytes or 0) - disk_space(copy.size)
            if self._bytes <= self._max_bytes:
                break

    def reindex(self, since: float | None = None) -> None:
        """Take up the copies that the journal does not know, and remove what is half of one.

        since: when the journal began (Unix seconds), where other threads may be storing copies. Those write their own
        into the journal, so only what was refused before then is taken up, and nothing is removed.
        """
        known = {copy.id for copy in self._journal.copies()}
        for path in self.folder.glob("*") if self.folder.is_dir() else ():
            if path.suffix != SUFFIX:
                if since is None:
                    path.unlink(missing_ok=True)
            elif path.stem not in known and (copy := _envelope(path)) and (since is None or copy.refused < since):
                self._journal.index_copy(copy)


def described(copy: Copy) -> str:
    """A copy in a line."""
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(copy.refused))
    return f"{copy.id}, {copy.size} bytes of {when} for {redact(copy.recipient)} ({one_line(copy.reason, 100)})"


def alarm(size: int, most: int, next_ones: list[str]) -> str:
    """What lost mail takes up (bytes), what may, and which copies go next."""
    what = f"the copies of mail that Zulip has lost take {size / 2**20:.0f} of {most / 2**20:.0f} MiB"
    remedy = "replay or purge them, or raise email_gateway_quarantine_max_mib"
    return f"{what}; the next to be removed: {'; '.join(next_ones)}; {remedy}"


def _envelope(path: Path) -> Copy | None:
    try:
        with files.opened(path) as file:
            return Copy(**json.loads(file.readline(_MAX_ENVELOPE)))
    except (OSError, ValueError, TypeError):
        return None


def _all(first: bytes, pieces: Iterable[bytes]) -> Iterator[bytes]:
    yield first
    yield from pieces
