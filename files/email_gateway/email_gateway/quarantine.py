"""Copies of refused mail, so that a refusal can be looked into and undone.

Two files a mail, ``ID.eml`` (the message as it came) and ``ID.json`` (envelope,
time, reason), readable by root and the gateway only, bounded by size and age.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from .verdict import Trouble


class Item(NamedTuple):
    """One refused mail. refused: Unix seconds; size: bytes of the message."""

    id: str
    recipient: str
    sender: str
    queue_id: str
    reason: str
    refused: float
    size: int
    # Accepted by Zulip and lost there: nobody was told, so it stays until it is replayed.
    lost: bool = False


class Quarantine:
    """The folder with the copies; every fault is raised as Trouble."""

    def __init__(self, folder: Path, max_bytes: int, max_days: float) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._max_age = max_days * 86400

    def keep(self, message: bytes, recipient: str, sender: str, queue_id: str, reason: str, lost: bool = False) -> Item:
        """Keep a copy; older ones make room for it, unless they are lost otherwise."""
        now = time.time()
        name = time.strftime("%Y%m%dT%H%M%S", time.gmtime(now)) + "-" + secrets.token_hex(4)
        item = Item(name, recipient, sender, queue_id, reason, now, len(message), lost)
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            self._write(name + ".eml", message)
            self._write(name + ".json", json.dumps(item._asdict()).encode())
        except OSError as error:
            with suppress(OSError):
                self._forget(name)  # or each new try would fill the disk further
            raise Trouble(
                "4.3.0", "state", f"cannot keep a copy in {self._folder}: {error.strerror}; look at its free space"
            ) from error
        self.tidy()
        return item

    def items(self) -> list[Item]:
        """All items, oldest first."""
        return sorted(self._items(), key=lambda item: item.refused)

    def get(self, name: str) -> Item:
        """The item with this id; KeyError if there is none."""
        for item in self._items():
            if item.id == name:
                return item
        raise KeyError(name)

    def message(self, item: Item) -> bytes:
        """The message as it came."""
        return (self._folder / f"{item.id}.eml").read_bytes()

    def remove(self, item: Item) -> None:
        """Forget a mail for good."""
        self._forget(item.id)

    def purge(self, older_than_days: float) -> int:
        """Remove what was refused longer ago than that; how many."""
        old = [item for item in self._items() if item.refused <= time.time() - older_than_days * 86400]
        for item in old:
            self.remove(item)
        return len(old)

    def tidy(self) -> None:
        """Remove the oldest until size and age are within bounds; the newest goes by age only."""
        now, total = time.time(), 0
        for number, item in enumerate(reversed([item for item in self.items() if not item.lost])):
            total += item.size
            if (number and total > self._max_bytes) or now - item.refused > self._max_age:
                self.remove(item)

    def _items(self) -> Iterator[Item]:
        for path in self._folder.glob("*.json") if self._folder.is_dir() else ():
            try:
                yield Item(**json.loads(path.read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError):
                continue  # removed meanwhile, or not ours

    def _forget(self, name: str) -> None:
        for suffix in (".json", ".eml"):
            (self._folder / (name + suffix)).unlink(missing_ok=True)

    def _write(self, name: str, content: bytes) -> None:
        descriptor = os.open(self._folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(descriptor)
