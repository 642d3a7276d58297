"""What strangers have written, shown on a terminal: nothing in it can steer the terminal."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator


def escaped(text: str) -> str:
    """The text with its unprintable characters as in a Python string, but for line ends and tabs."""
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() or sign in "\n\t" else repr(sign)[1:-1] for sign in text)


def readable(pieces: Iterable[bytes]) -> Iterator[str]:
    """A message as text; what is no UTF-8 is escaped as well."""
    decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
    for piece in pieces:
        yield escaped(decoder.decode(piece).replace("\r\n", "\n"))
    yield escaped(decoder.decode(b"", final=True))
