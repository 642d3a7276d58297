"""Mail that Zulip 11's SMTP server can never take in, repaired.

That server (zerver/lib/email_mirror_server.py, on aiosmtpd) parses a mail with Python's
email package and writes it out again, and answers 500 where that fails, at every try. It
fails, depending on the version of Python, where a header field has a character that
str.splitlines takes for a line end and email.parser does not: what follows would be another
line of the header. It fails for parts nested too deep, and for a multipart without parts
that is not in ASCII. What is beyond all measure (a header of more than 256 KiB, more than
10,000 parts) is left as it is.

Places are as in mime_structure.
"""

from __future__ import annotations

import re
from email.parser import BytesHeaderParser
from pathlib import Path
from typing import NamedTuple

from .message import Change, Message
from .mime_structure import MAX_DEPTH, MAX_PARTS, Structure, normalized, offsets

# How much may be in headers that have to be repaired (octets); no honest mail has more.
_MAX_FIELDS = 128 * 1024
_SEPARATORS = (b"\x0b", b"\x0c", b"\x1c", b"\x1d", b"\x1e")
# One that a line begins behind which would be none of the same field.
_BREAK = re.compile(rb"[\x0b\x0c\x1c-\x1e](?![ \t])(?=[ \t\x1f]*[^ \t\r\n\x0b\x0c\x1c-\x1f])")
_FIELD = re.compile(rb"(?s)(?:(?<=[\r\n])|\A)[!-9;-~]+:.*?(?:\r\n|\r(?!\n)|\n|\Z)(?![ \t])")
_TYPE = re.compile(rb"(?is)\n(Content-Type:.*?\n)(?![ \t])")


class NeverAccepted(Exception):
    """Zulip never takes this mail in, and nothing can be done about it; says why, for its sender."""


class _Inside(NamedTuple):
    """What is true of the parts of a multipart: the type of one that names none, and how deep they are."""

    default: str
    depth: int


class _Span(NamedTuple):
    """Places between which fields may have to be repaired, or else nothing but ASCII must be."""

    begin: int
    end: int
    is_header: bool


def enterable(message: Message, folder: Path) -> Message:
    """The mail as Zulip's server takes it: `message` itself where nothing has to be changed.

    folder: where another one is stored, which goes when it is no longer used. Raises
    NeverAccepted, and OSError if it cannot be stored.
    """
    try:
        changes = [] if _is_ordinary(message) else _changes(message)
    except NeverAccepted:
        raise
    except Exception:  # whatever it is, Zulip may take the mail
        changes = []
    return message.changed(changes, folder) if changes else message


def _changes(message: Message) -> list[Change]:
    spans = _spans(message)
    places = offsets(message.pieces(), (place for span in spans for place in (span.begin, span.end)))
    changes = []
    for span, begin, end in zip(spans, places, places, strict=True):
        if span.is_header:
            header = message.text(begin, end)
            repaired = _FIELD.sub(_repaired, header)
            if repaired != header:
                changes.append((begin, end, repaired))
        elif not all(piece.isascii() for piece in message.between(begin, end)):
            raise NeverAccepted("it claims to consist of parts (Content-Type: multipart), but has none")
    return changes


def _is_ordinary(message: Message) -> bool:
    """Whether the mail need not be looked at closely."""
    before, containers, is_ascii = b"", 0, True
    for piece in message.pieces():
        text = before + piece.lower()
        containers += text.count(b"multipart/") + text.count(b"message/")
        is_ascii = is_ascii and piece.isascii()
        if any(separator in piece for separator in _SEPARATORS) or (containers and not is_ascii):
            return False
        before = text[-9:]
    return containers <= MAX_DEPTH // 2  # one in a multipart/digest does not name its type


def _spans(message: Message) -> list[_Span]:
    """What has to be looked at, in ascending order. Raises NeverAccepted."""
    structure = Structure[_Inside](normalized(message.pieces()))
    inside: _Inside | None = _Inside("text/plain", 0)
    spans: list[_Span] = []
    left = _MAX_FIELDS
    for _ in range(MAX_PARTS):
        if inside is None:
            break
        begin, header = structure.place, structure.fields()
        if header is None:
            break
        if _BREAK.search(header):
            spans.append(_Span(begin, begin + len(header) - 2, is_header=True))
            left -= len(header)
        kind, boundary = _type_and_boundary(header, inside.default)
        inner = _Inside("message/rfc822" if kind == "multipart/digest" else "text/plain", inside.depth + 1)
        is_multipart, is_message = kind.startswith("multipart/"), kind.startswith("message/")
        # Python 3.10 to 3.13 fail behind 176 to 246 levels, by their type and by who calls them.
        if inside.depth == MAX_DEPTH and (is_multipart or is_message):
            raise NeverAccepted(f"its parts are nested too deeply for Zulip (more than {MAX_DEPTH})")
        if is_message and kind != "message/delivery-status":
            inside = inner
            continue
        may_have_parts = is_multipart and structure.enter(boundary, inner)
        # What is in a message/delivery-status are header fields, too (RFC 3464, 2.1).
        fields = structure.peek(_MAX_FIELDS) if is_message else b""
        body = structure.place
        end = max(body, structure.body()[0])
        if _BREAK.search(fields[: end - body]):
            spans.append(_Span(body, end, is_header=True))
            left -= end - body
        elif is_multipart and body < end and not (may_have_parts and structure.boundary == boundary):
            spans.append(_Span(body, end, is_header=False))
        if left < 0:
            raise NeverAccepted("its header fields have too many control characters")
        inside = structure.next_part()
    return spans


def _type_and_boundary(header: bytes, default: str) -> tuple[str, bytes | None]:
    """As Python sees them. Raises NeverAccepted where it fails, as Zulip's server does."""
    field = _TYPE.search(header)
    if field and not re.search(rb"(?i)multipart|message", field[1]):
        return "text/plain", None  # or another type without parts
    fields = BytesHeaderParser().parsebytes(field[1] if field else b"")
    fields.set_default_type(default)
    try:
        kind = fields.get_content_type()
        boundary = fields.get_boundary() if kind.startswith("multipart/") else None
    except Exception:
        raise NeverAccepted("its Content-Type cannot be read") from None
    return kind, None if boundary is None else boundary.encode("utf-8", "surrogateescape")


def _repaired(field: re.Match[bytes]) -> bytes:
    # One that is not in ASCII is written out as it came.
    return _BREAK.sub(b" ", field[0]) if field[0].isascii() else field[0]
