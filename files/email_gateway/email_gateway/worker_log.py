"""What Zulip's email_mirror worker tells in its log about each mail.

It takes the mails of its queue in order, one after the other, and writes one line for each
within milliseconds of having consumed it (zerver/lib/email_mirror.py, zerver/worker/
email_mirror.py), into the log of all workers and into supervisor's copy of its output:

    2026-11-25 02:47:44.941 INFO [zerver.lib.email_mirror] Successfully processed ...

in UTC, which is TIME_ZONE on every Zulip server (zproject/default_settings.py).
"""

from __future__ import annotations

import calendar
import math
import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from . import files

# The log of all workers, the one of this worker, the one of a process that serves all queues.
NAMES = ("workers.log", "events_email_mirror.log", "events.log")
ERRORS = "errors.log"
# One that was written so much later (seconds) than another is followed in its place.
_LATER = 60.0
# Where the last hour does not lie within so many bytes of the end, it is not known.
_MOST = 2**24
# Read at a time (bytes). A longer line is none of those that tell of mail.
_PIECE = 2**20
# Of what was added to a log, read at a time (bytes): others wait meanwhile.
_MOST_AT_ONCE = 2**22
# A log that was renamed is left with so much unread.
_MOST_LEFT = 2**26

POSTED, REPLY_POSTED = "posted", "reply posted"
NO_TEXT, NO_BODY, NOT_ALLOWED, NOT_QUEUED = "no text", "no body", "not allowed", "not queued"
INACTIVE, GONE, AUTOMATIC = "inactive", "gone", "automatic"
RATE_LIMITED, TIMED_OUT, FAILED, RESTARTS = "rate limited", "timed out", "failed", "restarts"

_KINDS = {
    REPLY_POSTED: rb"Successfully processed email from user \d+ to (.*)",
    POSTED: rb"Successfully processed email to (.*)",
    NO_TEXT: rb"Email has no nonempty body()",
    NO_BODY: rb"Unable to find plaintext or HTML()",
    NOT_ALLOWED: rb"Failed to process email to .*?\): (.*)",
    # Zulip then says "Successfully processed" all the same (zerver/actions/message_send.py).
    NOT_QUEUED: rb"Error queueing internal message by emailgateway@[^ ]*: (.*)",
    INACTIVE: rb"Sending user is not active()",
    GONE: rb"Sender: ()",
    AUTOMATIC: rb"Dropping auto-(?:replied|generated) message()",
    RATE_LIMITED: rb"MirrorWorker: Rejecting an email from: ()",
    TIMED_OUT: rb"Timed out ingesting message-id ()",
    FAILED: rb"(?:Problem handling data on queue|Timed out in) email_mirror\b()",
    RESTARTS: rb"\*\*\* Sending self SIGUSR1 to trigger a restart()",
}
_NUMBERED = tuple(_KINDS)
_TIME = re.compile(rb"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)[.,](\d{3}) ")
_FIRST_TIME = re.compile(rb"^" + _TIME.pattern, re.MULTILINE)
_LINE = re.compile(
    rb"^" + _TIME.pattern + rb"[A-Z]+ +(?:\[[^\]\n]*\] )?(?:" + rb"|".join(_KINDS.values()) + rb")", re.MULTILINE
)


class Line(NamedTuple):
    """What a line tells. at: Unix seconds; kind: one of those above; text: the channel that
    was posted to, or why it was not."""

    at: float
    kind: str
    text: str = ""

    @property
    def is_outcome(self) -> bool:
        """True if it tells what has become of a mail."""
        return self.kind not in (NOT_QUEUED, RESTARTS)

    @property
    def counts(self) -> bool:
        """True if the mail may have counted in Zulip's rate limit: replies never do, nor what is over it."""
        return self.is_outcome and self.kind not in (REPLY_POSTED, RATE_LIMITED, INACTIVE, AUTOMATIC)


class Position(NamedTuple):
    """How far a log was read."""

    name: str
    inode: int
    offset: int


class Follower:
    """Reads what is added to the first of the logs `names` that there is, through any rotation.

    position: where to go on; None for the end of what there is.
    """

    def __init__(self, folder: Path, names: tuple[str, ...] = NAMES, position: Position | None = None) -> None:
        self._folder, self._names = folder, names
        self.position = position
        self._descriptor: int | None = None
        # A log that was not there is read from its beginning.
        self._is_new = False
        # More was added than is read at once.
        self.is_behind = False

    def read(self) -> list[Line]:
        """The lines that tell of mail and were added since the last call; none where the log
        cannot be read."""
        lines: list[Line] = []
        self.is_behind = False
        with suppress(OSError):
            path = self._path()
            if path is None:
                self._is_new = not any((self._folder / name).exists() for name in self._names)
                return lines
            if self._descriptor is None or self.position is None or self.position.name != path.name:
                self._begin(path)
            lines += self._rest()
            if self.position and files.status_of(path).st_ino != self.position.inode:
                lines += self._rest()  # it was renamed: what was written until then
                if not self.is_behind or self._left() > _MOST_LEFT:
                    self._open(path, 0)
                    lines += self._rest()
        return lines

    def _path(self) -> Path | None:
        """The log that was followed so far, though it may be missing for a moment when it is rotated,
        unless another has been written to for longer."""
        found = find(self._folder, self._names)
        if found is None or self.position is None or found.name == self.position.name:
            return found
        path = self._folder / self.position.name
        if self._descriptor is None:
            return path if os.access(path, os.R_OK) else found
        written = files.status_of(found).st_mtime
        return found if written > os.fstat(self._descriptor).st_mtime + _LATER else path

    def _begin(self, path: Path) -> None:
        position = self.position
        if position is None or position.name != path.name:
            self._open(path, 0 if self._is_new and position is None else files.status_of(path).st_size)
            return
        for place in (path, *path.parent.glob(f"{path.name}.*")):
            if place.lstat().st_ino == position.inode:
                self._open(place, position.offset, path.name)
                return
        self._open(path, 0)  # what was read is gone

    def _open(self, path: Path, offset: int, name: str = "") -> None:
        with files.opened(path) as file:
            descriptor = os.dup(file.fileno())
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = descriptor
        self.position = Position(name or path.name, os.fstat(descriptor).st_ino, offset)

    def _left(self) -> int:
        """How much is behind the position (bytes)."""
        assert self._descriptor is not None and self.position is not None
        return os.fstat(self._descriptor).st_size - self.position.offset

    def _rest(self) -> Iterator[Line]:
        """The complete lines behind the position."""
        assert self._descriptor is not None and self.position is not None
        if os.fstat(self._descriptor).st_size < self.position.offset:  # it was emptied
            self.position = self.position._replace(offset=0)
        most = self.position.offset + _MOST_AT_ONCE
        for text, end in _complete_lines(self._descriptor, self.position.offset):
            self.position = self.position._replace(offset=end)
            yield from _lines(text)
            if end >= most:
                self.is_behind = True
                return


def find(folder: Path, names: tuple[str, ...] = NAMES) -> Path | None:
    """The log to follow, None where none can be read."""
    found: Path | None = None
    written = -math.inf
    for name in names:
        path = folder / name
        with suppress(OSError):
            at = files.status_of(path).st_mtime
            if at > written + _LATER and os.access(path, os.R_OK):
                found, written = path, at
    return found


def consumed_since(folder: Path, moment: float) -> list[float] | None:
    """When (Unix seconds) the worker consumed mail to channels since `moment`.

    None if that cannot be known: no log, or one that cannot be read or tells too little.
    """
    try:
        path = find(folder)
        if path is None:
            return None
        consumed, known_since = _tail(path)
        rotated = path.with_name(f"{path.name}.1")
        if known_since > moment and rotated.exists():
            older, known_since = _tail(rotated)
            consumed = older + consumed
    except OSError:
        return None
    return [at for at in consumed if at >= moment] if known_since <= moment else None


def _tail(path: Path) -> tuple[list[float], float]:
    """When mail was consumed by the end of a log, and since when that is complete."""
    consumed, first = list[float](), math.inf
    with files.opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        for text, _ in _complete_lines(file.fileno(), max(0, size - _MOST)):
            if first == math.inf and (match := _FIRST_TIME.search(text)):
                with suppress(ValueError):
                    first = _seconds(match[1], match[2])
            consumed += [line.at for line in _lines(text) if line.counts]
    if size <= _MOST and path.name in NAMES and not list(path.parent.glob(f"{path.name}.*")):
        return consumed, 0.0  # all there ever was
    return consumed, first


def _complete_lines(descriptor: int, offset: int) -> Iterator[tuple[bytes, int]]:
    """What is behind `offset`, but for an unfinished line; and where each piece ends."""
    while text := os.pread(descriptor, _PIECE, offset):
        end = text.rfind(b"\n") + 1 or (len(text) if len(text) == _PIECE else 0)
        if not end:
            return
        offset += end
        yield text[:end], offset


def _lines(text: bytes) -> Iterator[Line]:
    for match in _LINE.finditer(text):
        number = next(number for number in range(3, len(_NUMBERED) + 3) if match[number] is not None)
        with suppress(ValueError):  # no date
            told = match[number].decode("utf-8", "replace").strip()
            yield Line(_seconds(match[1], match[2]), _NUMBERED[number - 3], told)


def _seconds(date: bytes, milliseconds: bytes) -> float:
    return calendar.timegm(time.strptime(date.decode(), "%Y-%m-%d %H:%M:%S")) + int(milliseconds) / 1000
