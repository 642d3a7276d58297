"""The parts of a message, found while it is read once from its beginning to its end (RFC 2046).

What counts as a part here must be one for Python's email package (its feedparser), with
which Zulip reads, too. Inside, every line ends with "\\n"; a place is the number of octets
before it in such text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Generic, TypeVar

# The longest line (octets without its end).
MAX_LINE = 998
# No honest message has parts nested deeper, more parts, or a longer header (octets).
MAX_DEPTH = 100
MAX_PARTS = 10_000
_MAX_HEADER = 256 * 1024
# Faster than bytes.replace, where there are many.
_CR_TO_LF = bytes.maketrans(b"\r", b"\n")
# The end of the last line of a header. What begins with "--" may be a boundary, even with
# a colon in it.
_HEADER_END = re.compile(rb"\n(?!(?!--)[!-9;-~]+:|[ \t])")
# The same for Python, but for boundaries.
_FIELDS_END = re.compile(rb"\n(?![!-9;-~]*:|[ \t]|From )")
_DASHES = re.compile(rb"\n--([^\n]*)")

T = TypeVar("T")


def normalized(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The same text with "\\n" for CRLF, CR and LF alike; no piece is empty."""
    for piece in _whole_line_ends(pieces):
        yield piece.replace(b"\r\n", b"\n").translate(_CR_TO_LF)


def offsets(pieces: Iterable[bytes], places: Iterable[int]) -> Iterator[int]:
    """Where the `places`, in ascending order, are in the text that is not normalized; one
    before a "\\n" that stands for CRLF is before the CR. Raises LookupError behind the end."""
    whole = _whole_line_ends(pieces)
    piece, before, at = b"", 0, 0  # octets before the piece, and in it before the last place
    place = left = 0  # the last place, and what is left of the piece, both in normalized text
    for wanted in places:
        while wanted - place > left:
            place, before, at = place + left, before + len(piece), 0
            piece = next(whole, b"")
            if not piece:
                raise LookupError(wanted)
            left = len(piece) - piece.count(b"\r\n")
        end = start = at + wanted - place
        while (further := start + piece.count(b"\r\n", at, end)) > end:
            end = further
        if end > at and piece[end - 1 : end + 1] == b"\r\n":
            end += 1
        left, place, at = left - (wanted - place), wanted, end
        yield before + at


def skip_short_lines(text: bytes, start: int, stop: int) -> int:
    """Where the first overlong line begins, or else the last line before `stop`."""
    while (end := text.rfind(b"\n", start, min(start + MAX_LINE + 1, stop))) >= 0:
        start = end + 1
    return start


class Structure(Generic[T]):
    """A message in normalized pieces, read from one line that its structure is made of to
    the next. Each multipart has something of the caller's with it (T)."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        # A line end before the first line and one behind the last: all have both then.
        self._pieces = chain(pieces, [b"\n"])
        self._text = b"\n"
        self._start = -1  # the place where _text begins
        self._at = 0  # where in _text the line end before the next line is
        # The boundaries of the multiparts that it is in, the outermost first.
        self._open: dict[bytes, T] = {}
        # The last boundary read, without leading dashes; None where there is no more.
        self.boundary: bytes | None = None

    @property
    def place(self) -> int:
        """The place of the next line."""
        return self._start + self._at + 1

    def peek(self, size: int) -> bytes:
        """The next `size` octets, or what there is, without reading them."""
        while len(self._text) - self._at <= size and self._read():
            pass
        return self._text[self._at + 1 : self._at + 1 + size]

    def header(self) -> bytes | None:
        """Read a header: from the line end before it to the end of the empty line behind it.
        None, and nothing is read, if it is broken or too long."""
        end = self._search(_HEADER_END)
        if end is None or self._text[end + 1 : end + 2] != b"\n":
            return None
        header = self._text[self._at : end + 2]
        self._at = end + 1
        return header

    def fields(self) -> bytes | None:
        """Read a header as Python does, which ends a broken one before its first line that is
        no field: from the line end before it to its last one. None if it is too long."""
        end = self._search(_FIELDS_END)
        if end is None:
            return None
        if boundary := self._find_boundary(end):
            end = boundary.start()
        header = self._text[self._at : end + 1]
        self._at = end + 1 if self._text[end + 1 : end + 2] == b"\n" else end
        return header

    def enter(self, boundary: bytes | None, content: T) -> bool:
        """Look for the boundary of a multipart, too; whether it can have parts. Within one with
        the same boundary it cannot: that is the outer one's, as for Python."""
        if boundary is None or boundary in self._open or len(self._open) >= MAX_DEPTH:
            return False
        self._open[boundary] = content
        return True

    def body(self) -> tuple[int, bool]:
        """Read up to a boundary or the end: the place where the text before it ends, and
        whether that has an overlong line. The last line end is the boundary's (5.1.1)."""
        is_long = False
        while True:
            last = self._text.rfind(b"\n", self._at)
            boundary = self._find_boundary(last)
            end = boundary.start() if boundary else last
            is_long = is_long or end - skip_short_lines(self._text, self._at + 1, end) > MAX_LINE
            if boundary:
                self.boundary, self._at = boundary[1].rstrip(b" \t"), boundary.end()
                return self._start + end, is_long
            self._at = last
            if len(self._text) - last > MAX_LINE + 1:
                is_long = True
                self._skip_line()
            if not self._read():
                self.boundary = None
                return self.place - 1, is_long

    def next_part(self) -> T | None:
        """Go to the part behind the boundary read last, or behind a later one if that closes
        its multipart: what its multipart has with it; None if there is no more part."""
        while self.boundary is not None:
            name = self.boundary if self.boundary in self._open else self.boundary[:-2]
            while (innermost := self._open.popitem())[0] != name:
                pass
            if name == self.boundary:
                self._open[name] = innermost[1]
                return innermost[1]
            self.body()  # the epilogue
        return None

    def _search(self, header_end: re.Pattern[bytes]) -> int | None:
        """Where the last line of the header ends in _text; None if it is too long."""
        while True:
            last = self._text.rfind(b"\n", self._at)
            end = header_end.search(self._text, self._at, last + 1)
            if end and end.start() < last:
                return end.start()
            if len(self._text) - self._at > _MAX_HEADER:
                return None
            if not self._read():
                return last

    def _find_boundary(self, stop: int) -> re.Match[bytes] | None:
        for found in _DASHES.finditer(self._text, self._at, stop) if self._open else ():
            name = found[1].rstrip(b" \t")
            if name in self._open or (name.endswith(b"--") and name[:-2] in self._open):
                return found
        return None

    def _skip_line(self) -> None:
        while (end := self._text.find(b"\n", self._at + 1)) < 0:
            self._at = len(self._text) - 1
            self._read()
        self._at = end

    def _read(self) -> bool:
        """Read on, and forget what is behind; whether there was more."""
        piece = next(self._pieces, b"")
        self._start += self._at
        self._text = self._text[self._at :] + piece
        self._at = 0
        return bool(piece)


def _whole_line_ends(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The same text; no piece is empty, or ends within a CRLF."""
    rest = b""
    for piece in pieces:
        text = rest + piece
        rest = b"\r" if text.endswith(b"\r") else b""
        if len(text) > len(rest):
            yield text[: len(text) - len(rest)]
    if rest:
        yield rest
