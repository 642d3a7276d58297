"""All addresses of this Zulip: its own, aliases, those of former mail domains; and who may write to them.

Ansible writes the file, with every channel's address in it: whoever has one may post, so only the
gateway's user reads it, and nothing in it is ever told a sender.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from . import senders
from .addresses import Address, NotAGatewayAddress, Pattern, parse, redact
from .verdict import UNKNOWN_ADDRESS, Deferred, Refused, Verdict

NOBODY_READS = Refused(
    "5.7.1",
    "sends only",
    "Zulip only sends from this address, and nobody reads what comes to it. To answer a notification, answer in Zulip "
    "itself, or to a notification whose sender is a reply address (mm...)",
)
_NOT_KNOWN = (UNKNOWN_ADDRESS, "5.1.1")


class SendsOnly(NotAGatewayAddress):
    """One of the addresses from which Zulip sends."""


class Target(NamedTuple):
    """Where an alias leads: a local part behind the prefix, and what its channel is called, for the operator."""

    to: str
    channel: str


class AddressBook(NamedTuple):
    """former: the patterns of addresses that were valid before. aliases: by name. senders: who may write, by an
    alias's name or a channel's token, in lower case; not there: everybody. blocked: who may write to nobody.
    sends_from: Zulip's own senders, as in its settings. probe: where a mail is sent now and then, to see whether mail
    works; alerts: where the operator is told; each empty if there is none."""

    pattern: Pattern
    former: tuple[Pattern, ...] = ()
    aliases: Mapping[str, Target] = {}
    senders: Mapping[str, tuple[str, ...]] = {}
    blocked: tuple[str, ...] = ()
    sends_from: tuple[str, ...] = ()
    probe: str = ""
    alerts: str = ""

    def parse(self, recipient: str) -> Address:
        """The address of Zulip's that `recipient` stands for, in the current mail domain.

        Raises NotAGatewayAddress with a sentence for the sender, OtherPattern with one for the operator.
        """
        folded = recipient.strip().lower()
        if self._is_zulips(folded):
            raise SendsOnly("Zulip only sends from this address")
        fitting = [pattern for pattern in (self.pattern, *self.former) if pattern.fits(folded)]
        local = max(fitting, key=lambda pattern: len(pattern.prefix), default=self.pattern).local(folded)
        target = self.aliases.get(local)
        address = parse(self.pattern.address(local if target is None else target.to), self.pattern)
        return address if target is None else address._replace(alias=local)

    def token_of(self, recipient: str) -> str:
        """By what Zulip knows an address, the same for all that stands with it; the address itself where it is
        none of Zulip's."""
        try:
            return self.parse(recipient).token
        except ValueError:
            return recipient

    @property
    def domains(self) -> list[str]:
        """The mail domain, and former ones."""
        return sorted({pattern.domain for pattern in (self.pattern, *self.former)})

    def is_restricted(self, address: Address) -> bool:
        """True if not everybody may write to an address."""
        return bool(self.blocked) or self._listed_for(address) is not None

    def not_allowed(self, address: Address, found: Iterable[str]) -> Refused | None:
        """Why a mail that has these senders may not go to an address; an empty one is nobody's."""
        found = list(found)
        if any(senders.is_listed(sender, self.blocked) for sender in found):
            return Refused("5.7.1", "blocked sender", "this sender is blocked here")
        listed = self._listed_for(address)
        if listed is not None and not all(senders.is_listed(sender, listed) for sender in found):
            return Refused("5.7.1", "sender not listed", "only certain senders may write to this address")
        return None

    def _listed_for(self, address: Address) -> tuple[str, ...] | None:
        """Who may write to an address; None: everybody."""
        return self.senders.get(address.alias, self.senders.get(address.token))

    def _is_zulips(self, folded: str) -> bool:
        return any(
            re.fullmatch(re.escape(sender.lower()).replace(re.escape("{token}"), "[a-z0-9_-]+"), folded)
            for sender in self.sends_from
        )


def stale(address: Address, verdict: Verdict) -> Verdict:
    """That Zulip does not know what an alias leads to is no fault of the mail, which waits for another run."""
    if not address.alias or not isinstance(verdict, Refused) or (verdict.cause, verdict.status) != _NOT_KNOWN:
        return verdict
    what = f"the alias {address.alias} leads to an address that Zulip does not know any more"
    return Deferred("4.3.5", UNKNOWN_ADDRESS, f"{what}; run playbooks/site.yml, or mend email_gateway_aliases")


def load(path: Path, pattern: Pattern) -> AddressBook:
    """Read the file; raises OSError, or ValueError that says what is wrong in it."""
    try:
        return read(json.loads(path.read_text(encoding="utf-8")), pattern)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not what is expected: {error!r}") from error


def read(found: dict[str, Any], pattern: Pattern) -> AddressBook:
    """What the file says; raises ValueError, and KeyError, TypeError or AttributeError for anything else."""
    aliases = {str(name).lower(): Target(**target) for name, target in found["aliases"].items()}
    for name, target in aliases.items():
        try:
            parse(pattern.address(target.to), pattern)
        except NotAGatewayAddress:
            raise ValueError(f"the alias {name} leads to {redact(target.to)}, which is no channel's address") from None
    return AddressBook(
        pattern,
        tuple(Pattern.parse(text) for text in found["former"]),
        aliases,
        {name: tuple(senders.entry(text) for text in entries) for name, entries in found["senders"].items()},
        tuple(senders.entry(text) for text in found["blocked"]),
        tuple(found["sends_from"]),
        str(found.get("probe", "")),
        str(found.get("alerts", "")),
    )
