"""A stored message in the form that SMTP's DATA takes (RFC 5321, 4.5.2 and 4.5.3.1.6).

Zulip 11's SMTP server (aiosmtpd) refuses a message with a line of more than 998 octets.
Programs write such lines, and so do mail clients that leave paragraphs in one line. Cut
anywhere, as Postfix's own client does, such a line would lose a link or a character of
UTF-8. So the part of the message that it is in is encoded anew, which no reader sees. Only
headers, and what is no proper MIME, are cut.

Two rules keep this safe. What counts as a part here must be one for Python's email
package, with which Zulip reads, too: in doubt the lines are cut. And what is cut goes on
behind white space, so that no cut makes a header field: Zulip would obey an X-RcptTo.

Places are as in mime_structure.
"""

from __future__ import annotations

import base64
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import BinaryIO, NamedTuple

from .mime_structure import MAX_LINE, MAX_PARTS, Structure, normalized, skip_short_lines

# How much is read at a time (octets). The memory needed is a few times that.
PIECE = 128 * 1024
# No longer run of white space stays in a line that is folded (octets): it means no more
# than one space (RFC 5322, 3.2.2).
_MAX_SPACE = 80
_TEXT, _MESSAGE = b"text/plain", b"message/rfc822"

# A field up to the next. Lazy: a repeated group would take memory for each line.
_TYPE = re.compile(rb"(?is)\nContent-Type:(.*?)(?=\n[^ \t])")
_BOUNDARY = re.compile(rb'(?i);\s*boundary\s*=\s*(?:"([ !#-\[\]-~]{1,200})"|([!#-:=-~]{1,200}))\s*(?:;|\Z)')
_ENCODING = re.compile(rb"(?is)\nContent-Transfer-Encoding:(.*?)(?=\n[^ \t])")
# Where a line cannot be folded: the name of a field, and white space before any text.
_LEAD = re.compile(rb"(?:[!-9;-~]+:)?[ \t]*")
_LONG_SPACE = re.compile(rb"[ \t]{%d,}" % (_MAX_SPACE + 1))

_Treatment = Callable[[Iterable[bytes]], Iterator[bytes]]


class _Part(NamedTuple):
    """A part: the places where its header and its body begin and end, and what its body needs."""

    header: int
    body: int
    end: int
    treatment: _Treatment


def write_wire_format(message: BinaryIO, target: BinaryIO) -> None:
    """Write all of `message`, which must be seekable, to `target` as SMTP wants it.

    Every line ends with CRLF, the last one included; a leading dot is doubled. The line
    with a single dot, which ends the message, is left to the caller. Raises what the files
    raise, and nothing whatever the message is.
    """
    is_long = any(number for number, _ in _lines(_pieces(message)))
    at_line_start = True
    for text in filter(None, _shortened(message) if is_long else _pieces(message)):
        if at_line_start and text.startswith(b"."):
            target.write(b".")
        target.write(text.replace(b"\n.", b"\n..").replace(b"\n", b"\r\n"))
        at_line_start = text.endswith(b"\n")
    if not at_line_start:
        target.write(b"\r\n")


def _pieces(message: BinaryIO) -> Iterator[bytes]:
    """All of the file, as text of the kind that Structure reads."""
    message.seek(0)
    return normalized(iter(partial(message.read, PIECE), b""))


def _lines(pieces: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """The text as (0, lines that are short enough) and (n, a piece of the nth overlong
    line, whose end comes with what follows)."""
    rest, number, inside = b"", 0, False
    for piece in pieces:
        text, start = rest + piece, 0
        while True:
            if not inside:
                end = skip_short_lines(text, start, len(text))
                yield 0, text[start:end]
                start = end
                if len(text) - start <= MAX_LINE:
                    break
                inside, number = True, number + 1
            end = text.find(b"\n", start)
            if end < 0:
                yield number, text[start:]
                start = len(text)
                break
            yield number, text[start:end]
            start, inside = end, False
        rest = text[start:]
    yield 0, rest


def _shortened(message: BinaryIO) -> Iterator[bytes]:
    """All of the message, without an overlong line."""
    parts = list(_parts(message))
    text = _Text(message)
    for part in parts:
        yield from _shorten(_fold, text.until(part.header))
        header = b"".join(text.until(part.body))
        if part.treatment is _to_base64:
            header = _ENCODING.sub(b"", b"\n" + header)[1:-1] + b"Content-Transfer-Encoding: base64\n\n"
        yield from _shorten(_fold, [header])
        yield from part.treatment(text.until(part.end))
    yield from _shorten(_fold, text.until(sys.maxsize))


class _Text:
    """The message, read from place to place."""

    def __init__(self, message: BinaryIO) -> None:
        self._pieces = _pieces(message)
        self._piece = b""
        self._place = 0

    def until(self, end: int) -> Iterator[bytes]:
        """From where the last call ended to the place `end` or the end of the message."""
        while self._place < end and (piece := self._piece or next(self._pieces, b"")):
            wanted = piece[: end - self._place]
            self._piece = piece[len(wanted) :]
            self._place += len(wanted)
            yield wanted


def _shorten(treatment: _Treatment, pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The text with `treatment` applied to each overlong line."""
    for number, group in groupby(_lines(pieces), itemgetter(0)):
        line = map(itemgetter(1), group)
        yield from treatment(line) if number else line


def _fold(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """An overlong line, folded before white space (RFC 5322, 2.2.3), and where there is none
    as Postfix does it: cut, and continued behind a space (postconf(5), smtp_line_length_limit)."""
    room, line = MAX_LINE, b""
    for piece in _squeeze(pieces):
        line, start = line + piece, 0
        while len(line) - start > room:
            limit = start + room
            lead = _LEAD.match(line, start, limit)
            assert lead is not None  # it matches anything
            place = max(line.rfind(space, lead.end(), limit) for space in (b" ", b"\t"))
            if place >= 0:
                yield line[start:place] + b"\n"
                room = MAX_LINE
            else:
                place = _near(line, limit)
                yield line[start:place] + b"\n "
                room = MAX_LINE - 1
            start = place
        line = line[start:]
    yield line or b" "  # for white space alone: an empty line would end a header


def _squeeze(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """A line with little white space in a row, and none at its end: so folding it makes no
    line of only white space, which some take for the end of a header."""
    space = b""
    for piece in pieces:
        line = space + piece
        text = line.rstrip(b" \t")
        space = line[len(text) :][:_MAX_SPACE]
        yield _LONG_SPACE.sub(b" ", text)


def _cut(pieces: Iterable[bytes], end: bytes) -> Iterator[bytes]:
    """An overlong line as several that end with `end`."""
    room, line = MAX_LINE + 1 - len(end), b""
    for piece in pieces:
        line, start = line + piece, 0
        while len(line) - start > room:
            place = _near(line, start + room)
            yield line[start:place] + end
            start = place
        line = line[start:]
    yield line


def _near(line: bytes, limit: int) -> int:
    """The last place up to `limit` that is not within a character of UTF-8 or "=XX", nor
    before a "-", which could make a boundary; `limit` if there is none near it."""
    for place in range(limit, limit - 100, -1):
        if not 0x80 <= line[place] < 0xC0 and line[place] != ord("-") and b"=" not in line[place - 2 : place]:
            return place
    return limit


def _to_base64(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Text (not none) in base64, without the last line end. What is encoded has CRLF
    (RFC 2045, 6.8)."""
    rest = b""
    for piece in pieces:
        text = rest + piece.replace(b"\n", b"\r\n")
        full_lines = (len(text) - 1) // 57 * 57
        rest = text[full_lines:]
        yield base64.encodebytes(text[:full_lines])
    yield base64.encodebytes(rest)[:-1]


# In base64 a line end means nothing (RFC 2045, 6.8), in quoted-printable "=" takes it away (6.7).
_BY_ENCODING: dict[bytes, _Treatment] = {
    b"base64": partial(_shorten, partial(_cut, end=b"\n")),
    b"quoted-printable": partial(_shorten, partial(_cut, end=b"=\n")),
}


def _parts(message: BinaryIO) -> Iterator[_Part]:
    """The parts with an overlong line that need more than to have it folded (RFC 2046)."""
    structure = Structure[bytes](_pieces(message))
    default: bytes | None = _TEXT
    for _ in range(MAX_PARTS):
        if default is None:
            return
        start, header, treatment = structure.place, structure.header(), None
        if header is not None:
            kind, encoding = _value(_TYPE, header).split(b";")[0].rstrip() or default, _value(_ENCODING, header)
            if kind == _MESSAGE and _is_plain(encoding):
                default = _TEXT
                continue  # no base64 for the part itself (5.2.1), but for what is in it
            if kind.startswith(b"multipart/"):
                structure.enter(_boundary(header), _MESSAGE if kind == b"multipart/digest" else _TEXT)
            elif not kind.startswith(b"message/"):
                treatment = _to_base64 if _is_plain(encoding) else _BY_ENCODING.get(encoding)
        body = structure.place
        end, is_long = structure.body()
        if is_long and treatment is not None:
            yield _Part(start, body, end, treatment)
        default = structure.next_part()


def _value(field: re.Pattern[bytes], header: bytes) -> bytes:
    """The value of the first such field, in lower case; empty if there is none."""
    found = field.search(header)
    return found[1].strip().lower() if found else b""


def _boundary(header: bytes) -> bytes | None:
    """The boundary that a multipart names."""
    field = _TYPE.search(header)
    found = field and _BOUNDARY.search(field[1])
    return (found[1] or found[2]).rstrip() if found else None


def _is_plain(encoding: bytes) -> bool:
    """Whether text in it stands there as it is. That is how Python, and most, take an
    encoding that they do not know ("8-bit"); but others may know an X- or uuencode."""
    return encoding not in _BY_ENCODING and re.fullmatch(rb"(?!x-|uu)[0-9a-z-]*", encoding) is not None
