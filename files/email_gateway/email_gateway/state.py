"""The state all processes of this host share: one JSON file behind one lock.

The file is replaced atomically and flushed to disk before a mail is handed
over, so a crash or a power cut never forgets a hand-over. The lock is held for
milliseconds and never while waiting, so replies do not queue behind a flood.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .verdict import Deferred, Refused, Trouble, Verdict

# A JSON object: "slots" and "hold" (pace.py), "endpoint" and "accepted" (delivery.py),
# "counts", "since" and "damaged" (this file); in a file of its own "recovery" (recovery.py).
Data = dict[str, Any]


def count(data: Data, verdict: Verdict) -> None:
    """Add one to the counter of this outcome."""
    kind = type(verdict).__name__.lower()
    cause = verdict.cause if isinstance(verdict, (Deferred, Refused)) else "accepted"
    causes = data["counts"].setdefault(kind, {})
    causes[cause] = causes.get(cause, 0) + 1


class State:
    """Access to state.json in `folder`; every fault is raised as Trouble."""

    def __init__(self, folder: Path, name: str = "state") -> None:
        self.folder = folder
        self._file = folder / f"{name}.json"
        self._lock = folder / f"{name}.lock"

    def look(self) -> Data:
        """A snapshot without the lock: enough to read, not to decide upon."""
        with self._trouble():
            return self._read()

    @contextmanager
    def change(self) -> Iterator[Data]:
        """The state under the lock; what was changed is on disk afterwards."""
        with self._trouble():
            lock = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            with self._trouble():
                fcntl.flock(lock, fcntl.LOCK_EX)
                data = self._read()
                before = json.dumps(data)
            yield data
            with self._trouble():
                after = json.dumps(data)
                if after != before:
                    self._write(after)
        finally:
            os.close(lock)

    def _read(self) -> Data:
        try:
            text = self._file.read_bytes()
        except FileNotFoundError:
            return {"since": time.time(), "slots": [], "counts": {}}
        try:
            data = json.loads(text)
            if isinstance(data, dict) and isinstance(data["slots"], list) and isinstance(data["counts"], dict):
                return data
        except (ValueError, KeyError):
            pass
        # Nobody knows what was handed over: pace.py takes the windows as full.
        return {"since": time.time(), "slots": [], "counts": {}, "damaged": time.time()}

    def _write(self, text: str) -> None:
        draft = self._file.with_suffix(".new")
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            with open(descriptor, "w", encoding="utf-8", closefd=False) as file:
                file.write(text)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(draft, self._file)
        folder = os.open(self._file.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)  # or a power cut may bring the former file back
        finally:
            os.close(folder)

    @contextmanager
    def _trouble(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise Trouble(
                "4.3.0",
                "state",
                f"cannot use the state in {self.folder}: {error.strerror}; look at its free space and its owner",
            ) from error
