"""Mail that would write lines of its own into Zulip's log.

Zulip logs senders, message IDs and file names as they are when decoded ("Payload is not bytes
(invalid attachment NAME ...)", zerver/lib/email_mirror.py). With a line end in one, what follows looks
like a line of the worker's, by which outcome.py would take another's mail for refused, or posted. No
honest mail has one there. Fields are looked for at the begin of any line, whatever parts the mail
has, and read as Zulip reads them.
"""

from __future__ import annotations

import email
import re
import time
from email import policy

from .message import Message

_FIELD = re.compile(
    rb"(?i)(?<=[\r\n])(From|Sender|Message-ID|Auto-Submitted|Content-Type|Content-Disposition):[^\r\n]*"
    rb"(?:(?:\r\n|\r(?!\n)|\n)[ \t][^\r\n]*)*"
)
# What an encoded word (RFC 2047), and a parameter in pieces or with a charset (RFC 2231), cannot do without.
_SIGNS = (b"=?", b"*")
# No honest mail has a longer field of this kind (octets), and none takes Python so long (seconds of CPU).
_LONGEST, _MOST_SECONDS = 4096, 0.5


def forged(message: Message) -> str:
    """Why the mail cannot be given to Zulip, in words for its sender; empty if it can."""
    text, seconds = b"\n", 0.0
    pieces = message.pieces()
    piece = next(pieces, b"")
    while piece:
        text, piece = text[-2 * _LONGEST :] + piece, next(pieces, b"")
        for found in _FIELD.finditer(text) if any(sign in text for sign in _SIGNS) else ():
            field = found[0]
            if not any(sign in field for sign in _SIGNS):
                continue
            name = found[1].decode()
            if len(field) > _LONGEST:
                return f"its field {name} is longer than {_LONGEST} octets"
            if piece and found.end() == len(text):
                continue  # it goes on behind, and is found again with the next piece
            began = time.thread_time()
            if _has_line_end(field):
                return f"what is encoded in its field {name} has a line end"
            seconds += time.thread_time() - began
            if seconds > _MOST_SECONDS:
                return "its header takes too long to read"
    return ""


def _has_line_end(field: bytes) -> bool:
    """As Zulip's worker reads it; where Python fails with it, so does Zulip."""
    try:
        header = email.message_from_bytes(field + b"\n\n", policy=policy.default)
        decoded = [*map(str, header.values()), str(header.get_filename())]
    except Exception as error:
        return "CR or LF" in str(error)  # of a sender Python says so itself
    return any("\n" in one for one in decoded)
