"""What the poller remembers over a restart, in two small files in the gateway's state.

inbox.json: how far there is nothing for Zulip in the inbox, which mails cannot be posted and
since when, and which were copied and could not be removed yet. inbox-reading.json: what it is
just reading; who finds that file has ended in the middle of it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import files
from .verdict import Trouble

# A mail over which the poller has ended so often while it read it is not read again.
_ENOUGH = 2


class Notes:
    """Of one inbox; `inbox` tells it from all others, and how addresses in it look. Raises Trouble."""

    def __init__(self, folder: Path, inbox: str) -> None:
        self._path, self._reading = folder / "inbox.json", folder / "inbox-reading.json"
        self._inbox = inbox
        found = self._read(self._path)
        # Whether the poller has read it before.
        self.is_known = bool(found)
        # Up to this UID, there is nothing for Zulip.
        self.passed = int(found.get("passed", 0))
        self._since = {int(uid): float(since) for uid, since in found.get("since", {}).items()}
        self._copied = {int(uid) for uid in found.get("copied", [])}
        # How often the process has ended while it read a mail.
        self._ended = {int(uid): int(times) for uid, times in self._read(self._reading).get("ended", {}).items()}

    @property
    def suspects(self) -> set[int]:
        """The mails that are better read one at a time."""
        return set(self._ended)

    @property
    def too_bad(self) -> set[int]:
        """The mails that are not read any more."""
        return {uid for uid, times in self._ended.items() if times >= _ENOUGH}

    def pass_over(self, uid: int) -> None:
        """There is nothing for Zulip up to this UID."""
        if uid != self.passed or not self.is_known:
            self.is_known = True
            self.passed = uid
            self._write()

    def since(self, uid: int) -> float:
        """Since when (Unix seconds) this mail cannot be posted: now, if that is new."""
        if uid not in self._since:
            self._since[uid] = time.time()
            self._write()
        return self._since[uid]

    def was_copied(self, uid: int) -> bool:
        """True if this mail was copied to where it belongs, and has only to be removed."""
        return uid in self._copied

    def copied(self, uid: int) -> None:
        """Note that it was."""
        self._copied.add(uid)
        self._write()

    def keep_only(self, uids: set[int]) -> None:
        """Forget all other mails: they have left the inbox."""
        since = {uid: at for uid, at in self._since.items() if uid in uids}
        if len(since) < len(self._since) or not self._copied <= uids:
            self._since, self._copied = since, self._copied & uids
            self._write()
        if not self._ended.keys() <= uids:
            self._ended = {uid: times for uid, times in self._ended.items() if uid in uids}
            self._write_reading(self._ended)

    @contextmanager
    def reading(self, uids: Sequence[int]) -> Iterator[None]:
        """While it lasts, these mails are known to be read, should the process end."""
        self._write_reading(self._ended | {uid: self._ended.get(uid, 0) + 1 for uid in uids})
        try:
            yield
        finally:
            for uid in uids:
                self._ended.pop(uid, None)
            self._write_reading(self._ended)

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            with files.opened(path) as file:
                found = json.loads(file.read(2**24))
            return found if isinstance(found, dict) and found.get("inbox") == self._inbox else {}
        except (FileNotFoundError, ValueError, RecursionError):
            return {}
        except OSError as error:
            raise Trouble("4.3.0", "state", f"cannot read {path}: {error.strerror}") from error

    def _write(self) -> None:
        content = {"inbox": self._inbox, "passed": self.passed, "since": self._since, "copied": sorted(self._copied)}
        try:
            files.write(self._path, [json.dumps(content).encode()])
        except OSError as error:
            raise Trouble("4.3.0", "state", f"cannot write {self._path}: {error.strerror}") from error

    def _write_reading(self, ended: dict[int, int]) -> None:
        """Not in a way that outlives a power cut, which is no mail's fault: this happens with each of them."""
        try:
            self._reading.write_text(json.dumps({"inbox": self._inbox, "ended": ended}), encoding="utf-8")
        except OSError as error:
            raise Trouble("4.3.0", "state", f"cannot write {self._reading}: {error.strerror}") from error
