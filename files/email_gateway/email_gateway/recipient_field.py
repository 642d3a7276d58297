"""To which addresses of this Zulip a mail in an inbox was sent.

An inbox has no envelope, so the header has to tell. Zulip takes the first address with the
right prefix (find_emailgateway_recipient in zerver/lib/email_mirror.py); here the grammar
of its addresses decides, and all that the mail was sent to count.
"""

from __future__ import annotations

import email.parser
import email.policy
import re
from collections.abc import Iterable, Iterator
from email.message import Message

from .address_book import AddressBook

# What mail systems note on the way: to whom they deliver, or were asked to.
_NOTED = (
    *("X-Gm-Original-To", "X-Original-To", "Delivered-To", "X-Delivered-To"),
    *("Envelope-To", "X-Envelope-To", "X-Forwarded-To"),
)
# What the sender writes; who sends a mail on (RFC 5322, 3.6.6) comes before who wrote it.
_RESENT, _WRITTEN = ("Resent-To", "Resent-CC", "Resent-Bcc"), ("To", "CC", "Bcc")
# By these copies of one mail are known (message.Message.fingerprint).
_IDENTITY = ("Message-ID", "Date")
# All that is to be fetched of a header.
FIELDS = (*_NOTED, "Received", *_RESENT, *_WRITTEN, *_IDENTITY)
# For whom the mail system that wrote it has taken a mail (RFC 5321, 4.4).
_FOR = re.compile(r"(?is)\sfor\s+<?([^\s<>;]{1,998})")


def find_recipients(header: bytes, book: AddressBook) -> list[str]:
    """The addresses of Zulip's grammar in `header` (a message's header), each once, in lower case.

    What a mail system has noted decides: of a mail to a list, or one that somebody redirects,
    the sender has written other addresses. Where the sender has written a noted one as well,
    the mail is for all the others written there, too: many providers keep only one copy of a
    mail to several addresses of one inbox; copies that others keep are told by their identity.
    """
    # compat32 takes everything apart and raises nothing, however broken a field is.
    message = email.parser.BytesHeaderParser(policy=email.policy.compat32).parsebytes(header)
    noted = _found([*_values(message, _NOTED), *_last_hop(message)], book)
    written = _found(_values(message, _RESENT), book) or _found(_values(message, _WRITTEN), book)
    if noted and not (noted.keys() & written.keys() and all(field in message for field in _IDENTITY)):
        return list(noted.values())
    return list((noted | {token: address for token, address in written.items() if token not in noted}).values())


def _values(message: Message, fields: Iterable[str]) -> Iterator[str]:
    for field in fields:
        for value in message.get_all(field, []):
            yield str(value)


def _last_hop(message: Message) -> Iterator[str]:
    """For whom, by the latest Received field that says so; the ones before may be the sender's invention."""
    for value in _values(message, ["Received"]):
        if match := _FOR.search(value):
            yield match[1]
            return


def _found(values: Iterable[str], book: AddressBook) -> dict[str, str]:
    """The addresses by token. In a time that grows with the length alone: the fields are not parsed as
    lists of addresses, of which an address needs nothing."""
    domains = "|".join(map(re.escape, book.domains))
    address = re.compile(rf"(?<![\w.+-])[\w.+-]{{1,500}}\"?@(?:{domains})(?![\w-]|\.\w)", re.ASCII | re.IGNORECASE)
    found: dict[str, str] = {}
    for value in values:
        for match in address.finditer(value):
            candidate = match[0].replace('"', "").lower()
            try:
                found.setdefault(book.parse(candidate).token, candidate)
            except ValueError:
                continue
    return found
