"""To which gateway address a mail in an inbox was sent.

An inbox has no envelope; Zulip looks into the header (find_emailgateway_recipient in
zerver/lib/email_mirror.py), the fields that know best first, and so do we.
"""

from __future__ import annotations

import email.header
import email.parser
import email.policy
import email.utils
import re
from collections.abc import Iterator

from .addresses import Pattern

# So much of a field is read as a list of addresses (characters); all of it is looked through.
_MOST_PARSED = 4096
# In this order: what the mail system has noted, then what the sender has written.
FIELDS = ("X-Gm-Original-To", "Delivered-To", "Envelope-To", "Resent-To", "Resent-CC", "To", "CC")


def find_recipient(header: bytes, pattern: Pattern) -> str | None:
    """The first address in `header` (a message's header) that matches `pattern`."""
    # compat32 takes everything apart and raises nothing, however broken a field is.
    message = email.parser.BytesHeaderParser(policy=email.policy.compat32).parsebytes(header)
    for field in FIELDS:
        for value in message.get_all(field, []):
            for address in _addresses(str(value)):
                folded = address.strip().lower()
                if folded.startswith(pattern.prefix) and folded.endswith(f"@{pattern.domain}"):
                    return folded
    return None


def _addresses(value: str) -> Iterator[str]:
    """The addresses of one field, folded over lines or not, with names and brackets or without."""
    unfolded = re.sub(r"[\r\n]+[ \t]*", " ", value)
    try:
        # It takes a time that grows with the square of the length.
        listed = [address for _, address in email.utils.getaddresses([unfolded[:_MOST_PARSED]])]
    except (RecursionError, ValueError, IndexError):  # (((( and the like
        listed = []
    yield from (address for address in listed if "@" in address)
    # What is no list of addresses by RFC 5322 (an unquoted comma in a name) has them all the same.
    yield from (word for word in re.split(r"[\s<>,;:\"()\[\]]+", unfolded) if "@" in word[1:-1])
