"""A line in front of a mail's text, wherever Zulip may look for that: in its first plain and its first HTML part."""

from __future__ import annotations

import base64
import html
from pathlib import Path

from .mail_parts import TEXTS, Part, Unsure, parts_of
from .message import Change, Message
from .mime_structure import offsets

# In these encodings the line can stand as it is.
_AS_IT_IS = ("", "7bit", "8bit", "binary", "quoted-printable")


def marked(message: Message, line: str, folder: Path) -> Message:
    """The mail with `line` (ASCII) in front of its text; stored in `folder`. Raises OSError, and Unsure where
    Zulip might not see the line."""
    first: dict[str, Part] = {}
    for part in parts_of(message):
        if part.kind.startswith("message/"):
            raise Unsure
        if part.kind in TEXTS:
            first.setdefault(part.kind, part)
    # With nothing in the one, Zulip takes the other.
    parts = sorted((part for part in first.values() if not part.is_blank), key=lambda part: part.body)
    if not parts:
        raise Unsure
    places = offsets(message.pieces(), [part.body for part in parts])
    changes: list[Change] = [(place, place, _encoded(part, line)) for part, place in zip(parts, places, strict=True)]
    return message.changed(changes, folder)


def _encoded(part: Part, line: str) -> bytes:
    """The line as it has to stand in a part."""
    encodings = part.fields.get_all("Content-Transfer-Encoding", [])
    encoding = str(encodings[0] if encodings else "").lower()  # with a blank behind it, it would be another one
    try:
        is_ascii = line.encode(part.fields.get_content_charset("us-ascii")) == line.encode("ascii")
    except (LookupError, UnicodeError):
        raise Unsure from None
    if not is_ascii or len(encodings) > 1:
        raise Unsure
    text = f"<p><b>{html.escape(line)}</b></p>\n" if part.kind == "text/html" else f"**{line}**\n\n"
    if encoding == "base64":  # of a multiple of three, so that it has no end of its own
        return base64.b64encode(f"{text}{' ' * (-len(text) % 3)}".encode("ascii")) + b"\r\n"
    if encoding not in _AS_IT_IS:
        raise Unsure
    return text.replace("\n", "\r\n").encode("ascii")
