"""What a mail's senders and its header say about whether it may go to an address.

Asked twice: while Postfix takes a mail in (milter.py), when who sends it is told, and when it is delivered,
as the service need not have been there before.
"""

from __future__ import annotations

from . import sender_checks
from .address_book import NOBODY_READS, SendsOnly
from .addresses import Address
from .automatic import is_automatic_reply
from .config import Config
from .message import Message
from .senders import authors
from .verdict import DROPPED, Deferred, Delivered, Refused, Verdict


def verdict(config: Config, recipient: str, sender: str | None, message: Message) -> Verdict | None:
    """What can be said of a mail to a recipient; None: it may go on. sender: of the envelope, None if there is
    none. message: its header at least. Raises NotAGatewayAddress and OtherPattern, as AddressBook.parse does."""
    try:
        address = config.addresses.parse(recipient)
    except SendsOnly:
        # Bounces and answers of machines come to the addresses that Zulip sends from, and are of no use there.
        if is_automatic_reply(message, sender or "", sender is not None):
            return Delivered("a bounce or an automatic reply to Zulip's own sender address", DROPPED)
        return NOBODY_READS
    return _not_listed(config, address, sender, message) or _not_proven(config, address, sender, message)


def _not_listed(config: Config, address: Address, sender: str | None, message: Message) -> Refused | None:
    """Why its senders may not write to an address."""
    if not config.addresses.is_restricted(address):
        return None
    envelope = [] if sender is None else [sender]
    return config.addresses.not_allowed(address, [*envelope, *authors(message)])


def _not_proven(config: Config, address: Address, sender: str | None, message: Message) -> Refused | Deferred | None:
    """Why its author is not who he claims to be. A mail without an envelope was not checked."""
    if sender is None:
        return None
    found = sender_checks.findings(message.header(), authors(message))
    return sender_checks.verdict(config.sender_checks, found, address.is_reply)
