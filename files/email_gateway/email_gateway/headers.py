"""The header fields that only Zulip may set.

Zulip 11 takes a mail's recipients from ``X-RcptTo``, which its SMTP server adds
behind the fields that came with the mail, and reads the first
(zerver/lib/email_mirror_server.py). So none may come with the mail. Lines end
here where Python's email package, which Zulip reads mail with, ends them: a lone
CR, which is no line end for Postfix, would otherwise hide a field from it.
"""

from __future__ import annotations

import re

# A field with the lines that continue it, and any other single line.
_FIELD = re.compile(rb"[^\r\n]*(?:\r\n|\r|\n|\Z)(?:[ \t][^\r\n]*(?:\r\n|\r|\n|\Z))*")
_ZULIPS = re.compile(rb"X-(?:RcptTo|MailFrom|Peer)[ \t]*:", re.IGNORECASE)
_END = re.compile(rb"\r|\n|\Z")


def without_zulips_headers(message: bytes) -> bytes:
    """`message` without ``X-RcptTo``, ``X-MailFrom`` and ``X-Peer`` in its header."""
    kept, position = [], 0
    while position < len(message) and not _END.match(message, position):
        field = _FIELD.match(message, position)
        assert field is not None  # it matches any line
        if not _ZULIPS.match(message, position):
            kept.append(field[0])
        position = field.end()
    return b"".join(kept) + message[position:]
