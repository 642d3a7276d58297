"""Mails as the program has them: in files."""

from __future__ import annotations

import tempfile
from pathlib import Path

from email_gateway.message import Message


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
