"""Mail that may write lines of its own into Zulip's log.

Zulip logs senders and file names as they are when decoded ("Payload is not bytes (invalid
attachment NAME ...", zerver/lib/email_mirror.py). With a line end in them, what follows looks like a
line of the worker's. Whoever reads the log (outcome.py) has to know such mail; others may be
taken for it, which only costs time.
"""

from __future__ import annotations

import binascii
import re

from .message import Message

# A parameter in pieces or with a charset (RFC 2231); Python's email package takes blanks before the "=".
_PARAMETER = re.compile(rb"\*[0-9]*\*?[\s\x1c-\x1f\x80-\xff]*=")
# An encoded word (RFC 2047), which may begin within another: charset, encoding, text.
_LONGEST_CHARSET, _LONGEST_TEXT = 100, 3000
_WORD = re.compile(
    rb"=\?(?=([^?]{0,%d})(?:\?([^?]?)\?([^?]{0,%d}))?)" % (_LONGEST_CHARSET, _LONGEST_TEXT),
)
# Of these an octet 10 is a line end, and nothing else is one.
_PLAIN = re.compile(
    rb"(?i)(utf-8|us-ascii|iso-8859-\d\d?|windows-125\d|koi8-[ru]|gb2312|gbk|gb18030|big5|euc-(jp|kr)|shift_jis"
    rb"|iso-2022-(jp|kr))(\*[^*?]*)?"
)
_ENCODED_LINE_END = re.compile(rb"=0[aA]")
# No honest mail has more encoded words (a hundred addressees and long file names), and few have
# more asterisks in a piece.
_MOST_WORDS, _MOST_STARS = 1000, 1000
# What of a piece is looked at again with the next one: more than any of the above.
_OVERLAP = 4096


def may_forge(message: Message) -> bool:
    """Whether a line end may come out of it when its header fields are decoded."""
    before, words = b"", 0
    for piece in message.pieces():
        text = before + piece
        stars = text.count(b"*")
        if stars > _MOST_STARS or (stars and _PARAMETER.search(text)):
            return True
        if b"=?" in text:
            for found in _WORD.finditer(text):
                words += 1
                if words > _MOST_WORDS or _may_have_line_end(found[1], found[2], found[3]):
                    return True
        before = text[-_OVERLAP:]
    return False


def _may_have_line_end(charset: bytes, encoding: bytes | None, text: bytes | None) -> bool:
    if encoding is None or text is None:
        return len(charset) == _LONGEST_CHARSET
    if encoding not in (b"b", b"B", b"q", b"Q"):
        return False  # no encoded word
    if len(text) == _LONGEST_TEXT or not _PLAIN.fullmatch(charset):
        return True
    if encoding in b"qQ":
        return _ENCODED_LINE_END.search(text) is not None
    try:
        return b"\n" in binascii.a2b_base64(text + b"===")
    except binascii.Error:
        return True
