"""What SPF, DKIM and DMARC say of a mail's sender, and what follows from it.

rspamd checks them while Postfix takes a mail in, and writes its findings into one field of the
header, the words of which are made from what it has found (roles/postfix_localmail, templates/etc/
zulip-email-gateway-senders.conf.j2). Such fields that come with a mail are taken out there, so that
what stands in the field is true. Authentication-Results, which it writes too, is for people: what
senders write of themselves is quoted in it.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from .verdict import Deferred, Refused

FIELD = "X-Zulip-Email-Gateway-Sender"
MODES = OFF, MARK, ENFORCE = "off", "mark", "enforce"

_FIELD = re.compile(rb"(?im)^%s:[ \t]*([^\n]*)$" % FIELD.encode())
_WORD = re.compile(r"(dmarc|spf|domain)=([a-z0-9._-]+)")
# What DMARC asks for (RFC 7489, 6.3), if a mail fails it.
_ASKS = ("fail-quarantine", "fail-reject")
_LATER = "DNS does not say whether this mail's sender may use {}; please try again later"


class Findings(NamedTuple):
    """dmarc: pass, none, permerror, temperror, unclear (whose mail it is), or fail- with the domain's policy behind
    it (none, quarantine, reject); spf: as in RFC 7208; domain: of the author (From); each empty if it is not known."""

    dmarc: str = ""
    spf: str = ""
    domain: str = ""

    @property
    def fails(self) -> bool:
        """True if the sender is not who he claims to be, whatever his domain wants done about it."""
        return self.dmarc.startswith("fail-") or (self.dmarc in ("none", "permerror") and self.spf == "fail")

    @property
    def named(self) -> str:
        """The domain, for a person."""
        return self.domain or "its domain"


def findings(header: bytes, authors: list[str]) -> Findings | None:
    """What stands in a header; None if the sender was not checked. authors: as in its From field. Where that
    does not say clearly who has written the mail, DMARC has nothing to go by, and the mail fails it."""
    field = _FIELD.search(header)
    if field is None:
        return None
    found = Findings(**dict(_WORD.findall(field[1].decode("ascii", "replace"))))
    if found.dmarc == "local":
        return None
    domain = authors[0].rpartition("@")[2].lower() if authors else ""
    is_same = not domain.isascii() or found.domain in ("", domain)  # for others rspamd has the form in ASCII
    is_clear = len(authors) == 1 and domain and is_same and found.dmarc != "unclear"
    return found if is_clear else found._replace(dmarc="fail-reject", domain="")


def verdict(mode: str, found: Findings | None, is_reply: bool) -> Refused | Deferred | None:
    """Why Postfix may not take a mail now, or at all. A reply is posted as a user, and has to be his."""
    if mode == OFF or found is None:
        return None
    if found.dmarc in ("", "temperror"):
        return Deferred("4.4.3", "sender check", _LATER.format(found.named))
    if mode == MARK:
        return None
    if is_reply and found.dmarc == "none" and found.spf == "temperror":
        return Deferred("4.4.3", "sender check", _LATER.format(found.named))
    if found.dmarc == "fail-reject" or (is_reply and found.fails):
        what = f"this mail does not come from where {found.named} says that its mail comes from"
        return Refused("5.7.1", "sender check", f"{what} (SPF, DKIM, DMARC)")
    return None


def warning(found: Findings | None) -> str:
    """A line to put in front of the text; empty if there is nothing to warn of."""
    if found is None:
        return ""
    if found.dmarc in _ASKS:
        return f"Warning: the sender of this mail may be forged; {found.named} does not vouch for it (DMARC)."
    if found.dmarc in ("", "temperror"):  # while the gateway was not there to say so before
        return "Warning: the sender of this mail could not be checked."
    return ""
