"""A line in front of a mail's text, wherever Zulip may look for that: in its first plain and its first HTML part."""

from __future__ import annotations

import base64
import html
from email import policy
from email.parser import BytesParser
from pathlib import Path

from .mail_parts import TEXTS, Part, Unsure, parts_of
from .message import Change, Message
from .mime_structure import offsets

# In these encodings the line can stand as it is.
_AS_IT_IS = ("", "7bit", "8bit", "binary", "quoted-printable")
# What is said of mail that was sent; in them is no HTML.
_REPORTS = ("message/delivery-status", "message/disposition-notification")
# So much of a text is looked at; one in base64, which Python decodes as a whole or not at all, is no longer (bytes).
_BEGINNING, _LONGEST = 2**16, 2**22


def marked(message: Message, line: str, folder: Path) -> Message:
    """The mail with `line` (ASCII) in front of its text; stored in `folder`. Raises OSError, and Unsure where
    Zulip might not see the line."""
    try:
        return message.changed(_changes(message, line), folder)
    except OSError:
        raise
    except Exception as error:  # whatever the mail is
        raise Unsure from error


def _changes(message: Message, line: str) -> list[Change]:
    parts = parts_of(message)
    first = _first(parts)
    # One that is the whole mail is not read to its end.
    ends = {part.body + part.size for part in first} if len(parts) > 1 else set()
    places = sorted({place for part in first for place in (part.begin, part.body)} | ends)
    at = dict(zip(places, offsets(message.pieces(), places), strict=True))
    changes: list[Change] = []
    for part in first:
        body, end = at[part.body], at.get(part.body + part.size, message.size)
        header = message.text(at[part.begin], body)
        text = message.text(body, min(end, body + _LONGEST))
        added, seen = _added(header, part.kind, line)
        # With nothing in the one, Zulip takes the other.
        if _decoded(header, text, part.kind).strip():
            if not _decoded(header, added + text, part.kind).startswith(seen):
                raise Unsure
            changes.append((body, body, added))
    if not changes:
        raise Unsure
    return changes


def _first(parts: list[Part]) -> list[Part]:
    """The first part of each kind of text, in their order."""
    first: dict[str, Part] = {}
    boundaries = {str(part.fields.get_boundary()) for part in parts if part.kind.startswith("multipart/")}
    # The end of the one, and a part of the other, are the same line.
    if any(f"{boundary}--" in boundaries for boundary in boundaries):
        raise Unsure
    for part in parts:
        # Zulip looks for texts in an attached message, too.
        needed = TEXTS[:1] if part.kind in _REPORTS else TEXTS if part.kind.startswith("message/") else ()
        if not first.keys() >= set(needed):
            raise Unsure
        if part.kind in TEXTS:
            first.setdefault(part.kind, part)
    return list(first.values())


def _added(header: bytes, kind: str, line: str) -> tuple[bytes, str]:
    """The line as it has to stand in a part, and as it is seen there."""
    encodings = BytesParser(policy=policy.default).parsebytes(header).get_all("Content-Transfer-Encoding", [])
    encoding = str(encodings[0]).lower() if encodings else ""
    text = f"<p><b>{html.escape(line)}</b></p>\n" if kind == "text/html" else f"**{line}**\n\n"
    if encoding == "base64":  # of a multiple of three, so that it has no end of its own
        return base64.b64encode(f"{text}{' ' * (-len(text) % 3)}".encode("ascii")) + b"\r\n", text
    if encoding not in _AS_IT_IS:
        raise Unsure
    return text.replace("\n", "\r\n").encode("ascii"), text


def _decoded(header: bytes, text: bytes, kind: str) -> str:
    """The beginning of a part's text, as Zulip decodes it (zerver/lib/email_mirror.py)."""
    part = BytesParser(policy=policy.default).parsebytes(header, headersonly=True)
    is_whole = str(part.get("Content-Transfer-Encoding", "")).lower() == "base64"
    if part.get_content_type() != kind or (is_whole and len(text) >= _LONGEST):
        raise Unsure
    # What the parser makes of it must not depend on what is in the text.
    part.set_payload((text if is_whole else text[:_BEGINNING]).decode("ascii", "surrogateescape"))
    payload = part.get_payload(decode=True)
    if not isinstance(payload, bytes):
        raise Unsure
    return payload.decode(part.get_content_charset("us-ascii"), "ignore").replace("\r\n", "\n")
