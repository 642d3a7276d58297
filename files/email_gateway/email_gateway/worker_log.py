"""What Zulip's email_mirror worker has consumed lately, by its own log.

It writes one line for each mail within milliseconds of having consumed it
(zerver/lib/email_mirror.py), into a log of its own and into the one of all workers:

    2026-11-25 02:47:44.941 INFO [zerver.lib.email_mirror] Successfully processed ...

in UTC, which is TIME_ZONE on every Zulip server (zproject/default_settings.py).
"""

from __future__ import annotations

import calendar
import math
import os
import re
import time
from pathlib import Path

# Of these the one written last: its own (supervisor's copy of its output), the one of a
# process that serves all queues, the one of all workers.
NAMES = ("events_email_mirror.log", "events.log", "workers.log")
# Where the last hour does not lie within so many bytes of the end, it is not known.
_MOST = 2**24

_TIME = re.compile(rb"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)[.,](\d{3}) ")
# Mail to a channel that has passed the limit. Replies ("from user N") are never counted;
# what was over the limit was not counted either.
_CONSUMED = re.compile(
    rb"\[zerver\.(?:lib\.email_mirror|worker\.email_mirror)\] "
    rb"(?:Successfully processed email (?!from user)|Email has no nonempty body|Unable to find plaintext or HTML"
    rb"|Timed out ingesting|Failed to process email|Sender: )"
)


def consumed_since(folder: Path, moment: float) -> list[float] | None:
    """When (Unix seconds) the worker consumed mail to channels since `moment`.

    None if that cannot be known: no log, or one that cannot be read or tells too little.
    """
    try:
        logs = sorted((path.stat().st_mtime, path) for name in NAMES if (path := folder / name).exists())
        if not logs:
            return None
        path = logs[-1][1]
        consumed, known_since = _read(path)
        rotated = path.with_name(f"{path.name}.1")
        if known_since > moment and rotated.exists():
            older, known_since = _read(rotated)
            consumed = older + consumed
    except OSError:
        return None
    return [at for at in consumed if at >= moment] if known_since <= moment else None


def _read(path: Path) -> tuple[list[float], float]:
    """When mail was consumed by the end of a log, and since when that is complete."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(max(0, size - _MOST))
        consumed, first = [], None
        for line in file:
            if (first is None or _CONSUMED.search(line)) and (match := _TIME.match(line)):
                try:
                    at = _seconds(match)
                except ValueError:
                    continue  # no date
                first = at if first is None else first
                if _CONSUMED.search(line):
                    consumed.append(at)
    if size <= _MOST and path.name in NAMES and not list(path.parent.glob(f"{path.name}.*")):
        return consumed, 0.0  # all there ever was
    return consumed, math.inf if first is None else first


def _seconds(match: re.Match[bytes]) -> float:
    return calendar.timegm(time.strptime(match[1].decode(), "%Y-%m-%d %H:%M:%S")) + int(match[2]) / 1000
