"""The grammar of Zulip's email addresses (zerver/lib/email_mirror_helpers.py).

Channel: ``slug.token[.word...]`` or ``token[.option...]``, with ``+`` for ``.`` anywhere; the token is
32 hex digits. Zulip drops its options wherever they stand and takes the second of the parts that are
left, or the only one. Reply to a notification: ``mm`` and 32 hex digits, nothing else.
Zulip compares case-sensitively, so everything is folded to lower case here.
The same grammar stands as a map for Postfix in the role postfix_localmail; a
test holds the two together.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_TOKEN = "[0-9a-f]{32}"
_REPLY = re.compile(rf"mm{_TOKEN}")
_OPTIONS = ("show-sender", "include-footer", "include-quotes", "prefer-text", "prefer-html")
_CHANNEL = re.compile(rf"[\w-]+[.+]{_TOKEN}([.+][a-z0-9-]+)*|{_TOKEN}([.+]({'|'.join(_OPTIONS)}))*", re.ASCII)
_SECRET = re.compile(r"(mm)?([0-9a-f]{4})[0-9a-f]{28}", re.IGNORECASE)


class NotAGatewayAddress(ValueError):
    """The address cannot be one of Zulip's, whatever Zulip's state."""


class OtherPattern(ValueError):
    """Postfix takes mail for another domain or prefix than gateway.conf knows."""


class Pattern(NamedTuple):
    """``EMAIL_GATEWAY_PATTERN`` taken apart: ``prefix%s@domain``, lower case."""

    prefix: str
    domain: str

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Parse Zulip's setting; ValueError says what to write instead."""
        match = re.fullmatch(r"([\w.+-]*)%s@([a-z0-9-]+(?:\.[a-z0-9-]+)*)", text, re.ASCII)
        if match is None or text != text.lower():
            raise ValueError(
                f"{text!r} is no EMAIL_GATEWAY_PATTERN; write it in lower case as "
                "'%s@emaildomain.example.com' or 'user+%s@emaildomain.example.com'"
            )
        return cls(match[1], match[2])

    def address(self, local: str) -> str:
        """The address with `local` in the place of ``%s``."""
        return f"{self.prefix}{local}@{self.domain}"

    def fits(self, folded: str) -> bool:
        """True for an address of this prefix and domain; folded: in lower case."""
        local, _, domain = folded.rpartition("@")
        return domain == self.domain and local.startswith(self.prefix)

    def local(self, folded: str) -> str:
        """What stands in the place of ``%s``; raises OtherPattern."""
        local, _, domain = folded.rpartition("@")
        if domain != self.domain:
            raise OtherPattern(f"mail for {domain}, but the mail domain in gateway.conf is {self.domain}")
        if not local.startswith(self.prefix):
            raise OtherPattern(f"mail for {redact(folded)}, but addresses begin with {self.prefix} in gateway.conf")
        return local.removeprefix(self.prefix)


class Address(NamedTuple):
    """An address that Zulip may know: folded, whether it is a reply, and by what Zulip knows it; and the
    alias that stands for it, if one does (address_book.py)."""

    text: str
    is_reply: bool
    token: str
    alias: str = ""


def parse(recipient: str, pattern: Pattern) -> Address:
    """Fold `recipient` and check it against the grammar.

    Raises NotAGatewayAddress with a sentence for the sender, OtherPattern with one
    for the operator.
    """
    folded = recipient.strip().lower()
    local = pattern.local(folded)
    if _REPLY.fullmatch(local):
        return Address(folded, is_reply=True, token=local)
    parts = [part for part in re.split("[.+]", local) if part not in _OPTIONS]
    token = parts[min(len(parts), 2) - 1] if parts else ""
    if _CHANNEL.fullmatch(local) and re.fullmatch(_TOKEN, token):
        return Address(folded, is_reply=False, token=token)
    raise NotAGatewayAddress("the address is neither a channel's nor a reply address of this Zulip server")


def redact(text: str) -> str:
    """Shorten every token in `text`: whoever has the address may post."""
    return _SECRET.sub(lambda match: (match[1] or "") + match[2] + "...", text)
