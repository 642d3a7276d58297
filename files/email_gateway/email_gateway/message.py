"""A mail on the disk: read in pieces, never held in memory as a whole.

Zulip 11 takes a mail's recipients from ``X-RcptTo``, which its SMTP server adds behind
the fields that came with the mail, and reads the first (zerver/lib/email_mirror_server.py).
So none may come with the mail, nor ``X-MailFrom`` and ``X-Peer``. Lines end here where
Python's email package, which Zulip reads mail with, ends them: a lone CR, which is no
line end for Postfix, would otherwise hide a field from it.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

# Base64 of a piece has no padding: a multiple of three (bytes).
PIECE = 3 * 2**14

_RESERVED = rb"X-(?:RcptTo|MailFrom|Peer)[ \t]*:"
_LINE_END = rb"(?:\r\n|\r(?!\n)|\n)"
_HAS_RESERVED = re.compile(_RESERVED, re.IGNORECASE)
# By these its sender tells a mail from his others.
_IDENTITY = re.compile(rb"(?im)^(?:Message-ID|Date|From|Subject)[ \t]*:[^\r\n]*(?:\r?\n[ \t][^\r\n]*)*")
_MOST_OF_HEADER = 2**17
_MOST_LOOKED_AT = 2**18
# A line end and the beginning of another: what is between them is an empty line.
_EMPTY_LINE = (b"\n\n", b"\n\r", b"\r\r")
# Such a field with the lines that continue it; what goes on behind the piece is cut off later.
_FIELD = re.compile(
    rb"(?:(?<=[\r\n])|\A)" + _RESERVED + rb"[^\r\n]*(?:" + _LINE_END + rb"[ \t][^\r\n]*)*(?:" + _LINE_END + rb"|\Z)",
    re.IGNORECASE,
)
# A line that continues any field: each block gets it at its end, and it goes with a reserved
# field. Random, so that no mail has it.
_PROBE = b" " + os.urandom(16).hex().encode() + b"\n"
_FIELD_END = re.compile(_LINE_END + rb"(?![ \t]|\Z)")
# The longest of the three names, with a line end before it and some blanks behind.
_OVERLAP = 64

# Where text to replace begins and ends (bytes), and the new text.
Change = tuple[int, int, bytes]


class Message:
    """A mail in an open file, which is read from its beginning each time."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.size = os.fstat(file.fileno()).st_size

    def pieces(self, begin: int = 0) -> Iterator[bytes]:
        """The file from the byte `begin` on, in pieces of PIECE bytes, but for the last."""
        # By position: who else reads this mail at the same time does not disturb.
        while piece := os.pread(self._file.fileno(), PIECE, begin):
            begin += len(piece)
            yield piece

    def file(self) -> BinaryIO:
        """The open file, at its beginning."""
        self._file.seek(0)
        return self._file

    def digest(self) -> bytes:
        """The same for the same mail, and for no other (16 bytes)."""
        digest = hashlib.blake2b(digest_size=16)
        for piece in self.pieces():
            digest.update(piece)
        return digest.digest()

    def fingerprint(self) -> bytes | None:
        """The same for copies of one mail, whatever mail systems have noted on the way (16 bytes); None if
        it has no Message-ID and Date, by which its sender tells it from the others (RFC 5322, 3.6)."""
        begin = self.text(0, _MOST_OF_HEADER)
        end = _header_end(begin)
        fields = _IDENTITY.findall(begin[:end])
        names = {field[: field.index(b":")].strip().lower() for field in fields}
        if end is None or not {b"message-id", b"date"} <= names:
            return None
        digest = hashlib.blake2b(b"".join(sorted(fields)), digest_size=16)
        for piece in self.pieces(end):
            digest.update(piece)
        return digest.digest()

    def without_reserved_fields(self, folder: Path) -> Message:
        """The mail as it may go to Zulip: this one where no reserved field came with it.

        folder: where another one is stored, which goes when it is no longer used.
        """
        end = self._header_with_reserved_fields()
        if end is None:
            return self
        draft, last = stored(folder), b""
        for piece in _cleaned(self.between(0, end)):
            draft.write(piece)
            last = piece[-1:] or last
        # The CR before a field that is gone and the LF of the empty line would be one line end, and the body a header.
        if last == b"\r" and self.text(end, end + 1) == b"\n":
            draft.write(b"\n")
        for piece in self.pieces(end):
            draft.write(piece)
        draft.flush()
        return Message(draft)

    def has_longer_header(self, most: int) -> bool:
        """True if the header is longer than that (bytes)."""
        begin = self.text(0, most)
        return len(begin) == most and _header_end(begin) is None

    def changed(self, changes: Iterable[Change], folder: Path) -> Message:
        """The mail with changes, which are in ascending order, and otherwise byte for byte the
        same; stored in `folder` until it is no longer used. Raises OSError."""
        draft, place = stored(folder), 0
        for begin, end, text in (*changes, (self.size, self.size, b"")):
            for piece in self.between(place, begin):
                draft.write(piece)
            draft.write(text)
            place = end
        draft.flush()
        return Message(draft)

    def header(self) -> bytes:
        """The header with LF as line end, as much of it as anybody looks at."""
        return self.text(0, _MOST_LOOKED_AT).replace(b"\r\n", b"\n").partition(b"\n\n")[0]

    def text(self, begin: int, end: int) -> bytes:
        """All that is between the bytes `begin` and `end`."""
        return b"".join(self.between(begin, end))

    def _header_with_reserved_fields(self) -> int | None:
        """Where the header ends (bytes), if it has a reserved field."""
        found, before, position = False, b"", 0
        for piece in self.pieces():
            text = before + piece
            start = position - len(before)
            end = _header_end(text) if start or text[:1] not in (b"\r", b"\n") else 0
            header = text if end is None else text[:end]
            found = found or _HAS_RESERVED.search(header) is not None
            if end is not None:
                return start + end if found else None
            before, position = text[-_OVERLAP:], position + len(piece)
        return self.size if found else None

    def between(self, begin: int, end: int) -> Iterator[bytes]:
        """The file between two places, in pieces."""
        for piece in self.pieces(begin) if begin < end else ():
            yield piece[: end - begin]
            begin += len(piece)
            if begin >= end:
                return


def stored(folder: Path) -> BinaryIO:
    """A new file in `folder` that has no name and goes when it is closed; raises OSError."""
    return tempfile.TemporaryFile(dir=folder)


def _header_end(text: bytes) -> int | None:
    """Where the empty line behind the header begins, if it is in `text`."""
    ends = [place for pair in _EMPTY_LINE if (place := text.find(pair)) >= 0]
    return min(ends) + 1 if ends else None


def _cleaned(header: Iterator[bytes]) -> Iterator[bytes]:
    """The pieces of a header without the reserved fields."""
    pending: list[bytes] = []
    in_reserved_field = False
    for piece in itertools.chain(header, (b"",)):
        # Blocks of whole lines. A CR at the end may be half of a CRLF.
        cut = max(piece.rfind(b"\n"), piece.rfind(b"\r", 0, -1)) + 1
        if piece and not cut:
            pending.append(piece)
            continue
        block = b"".join((*pending, piece[:cut]))
        pending = [piece[cut:]]
        if in_reserved_field and block[:1] in (b" ", b"\t"):
            end = _FIELD_END.search(block)
            if end is None:
                continue
            block = block[end.end() :]
        if not block:
            continue
        if not _HAS_RESERVED.search(block):  # the other expression takes four times as long
            in_reserved_field = False
            yield block
            continue
        block = _FIELD.sub(b"", block + _PROBE)
        in_reserved_field = not block.endswith(_PROBE)
        yield block if in_reserved_field else block[: -len(_PROBE)]
