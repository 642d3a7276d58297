"""Who has sent a mail, and whether he stands in a list of addresses and domains.

A list has ``user@example.com`` for one address and ``@example.com`` for all of one domain.
Neither of a mail's senders is proven by this: see email_gateway_sender_checks.
"""

from __future__ import annotations

import email.parser
import email.policy
import email.utils
import re
from collections.abc import Iterable

from .message import Message

# An author's field is short (characters). What is longer is made to confuse.
_MOST = 2000
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"|\((?:[^()\\]|\\.)*\)|\\.', re.DOTALL)
_FROM = re.compile(rb"(?im)^From[ \t]*:")
_ENTRY = re.compile(r"[^\s@<>,;]*@[^\s@<>,;]+")


def entry(text: str) -> str:
    """An entry of a list, folded; ValueError says what to write instead."""
    if not _ENTRY.fullmatch(text):
        raise ValueError(f"{text!r} is no sender; write 'user@example.com', or '@example.com' for a whole domain")
    return text.lower()


def is_listed(sender: str, entries: Iterable[str]) -> bool:
    """True if an address stands in the list, or its domain does; the null sender never does."""
    folded = sender.strip().strip("<>").lower()
    _, at, domain = folded.rpartition("@")
    return bool(at) and (folded in entries or f"@{domain}" in entries)


def authors(message: Message) -> list[str]:
    """The addresses in a mail's From field (RFC 5322, 3.6.2); an empty one with them where it does not say
    clearly who has written the mail."""
    header = email.parser.BytesHeaderParser(policy=email.policy.compat32).parsebytes(message.header())
    fields = [str(field) for field in header.get_all("From", [])]
    # Others, unlike Python, know the field by "From :" as well.
    number = len(_FROM.findall(message.header()))
    field = ",".join(fields)[:_MOST]
    found = [address for _, address in email.utils.getaddresses([field]) if address]
    # What others may read differently has an @ that is no address's.
    is_clear = number == len(fields) == 1 and len(field) < _MOST and len(found) == _QUOTED.sub("", field).count("@")
    return found if found and is_clear else [*found, ""]
