"""Mails as the program has them, in files; what a test does with them."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from email_gateway.message import Message
from email_gateway.verdict import Delivered

POSTED = Delivered("posted in Zulip", "posted")
BEFORE = POSTED._replace(note="accepted by Zulip before")


def mail(content: bytes) -> Message:
    """A mail in a file without a name."""
    file = tempfile.TemporaryFile()  # noqa: SIM115 - it goes with the mail
    file.write(content)
    file.flush()
    return Message(file)


def text(message: Message) -> bytes:
    return b"".join(message.pieces())


def spool(folder: Path) -> Path:
    """A folder for mail under way."""
    (folder / "spool").mkdir(exist_ok=True)
    return folder / "spool"


def eventually(check: Callable[[], object], seconds: float = 20) -> bool:
    """Whether it becomes true within so many seconds, which only a failing test waits out."""
    end = time.monotonic() + seconds
    while not (found := check()) and time.monotonic() < end:
        time.sleep(0.01)
    return bool(found)


def line(at: float, text: str, logger: str = "zerver.lib.email_mirror") -> str:
    """A line of Zulip's log."""
    stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(at)) + f".{int(at * 1000) % 1000:03}"
    return f"{stamp} INFO [{logger}] {text}\n"


def tell(logs: Path, *texts: str, log: str = "workers.log") -> None:
    """As Zulip's worker does."""
    with (logs / log).open("a") as file:
        file.write("".join(line(time.time(), text) for text in texts))
