"""What an operator has to know is posted in Zulip, once for each cause, and once more when it is over.

By the way that all mail goes, and so only while that works: what goes on without Zulip is for doctor and the
metrics. Never more than a handful a day, whatever happens.
"""

from __future__ import annotations

import email.utils
import time
from collections.abc import Callable, Iterator
from email.message import EmailMessage
from typing import NamedTuple

from . import certificate
from .gateway import Envelope, Gateway
from .message import Message, stored
from .verdict import Deferred

# So many a day at most (seconds).
MOST, DAY = 8, 86400.0
# What waits longer is told (seconds).
WAITS = 3600.0
# Refusals within an hour: more than these, and than so many times the usual number of an hour.
FEW, USUAL = 20, 4
# Others wait for this one to end: seconds for room within Zulip's limits.
_ROOM = 5.0


class Cause(NamedTuple):
    """Why something is posted: a stable name, what is wrong, and what is posted once it is over."""

    name: str
    text: str
    over: str


class Alerts:
    """Posts on behalf of `gateway`. clock: Unix seconds."""

    def __init__(self, gateway: Gateway, clock: Callable[[], float] = time.time) -> None:
        self._gateway = gateway
        self._journal = gateway.journal
        self._now = clock()

    def run(self) -> list[str]:
        """Post what is new and what is over; a line for each. Raises Trouble."""
        if not self._gateway.config.addresses.alerts:
            return []
        told: dict[str, str] = self._journal.note("alerts") or {}
        causes = {cause.name: cause for cause in self._causes()}
        said = []
        for name in sorted(causes.keys() - told.keys()):
            if self._post(causes[name].text):
                told[name] = causes[name].over
                said.append(f"alert: {causes[name].text}")
                self._note(told)
        for name in sorted(told.keys() - causes.keys()):
            if self._post(told[name]):
                said.append(f"alert: {told.pop(name)}")
                self._note(told)
        return said

    def _note(self, told: dict[str, str]) -> None:
        with self._journal.change() as database:
            self._journal.write_note(database, "alerts", told)

    def _causes(self) -> Iterator[Cause]:
        config, now = self._gateway.config, self._now
        _, lost, _ = self._journal.number_of_copies()
        if lost:
            what = f"Zulip has accepted {lost} mails and not posted them; copies are in quarantine"
            text = f"{what}: zulip-email-gateway quarantine list, then replay ID"
            yield Cause("lost", text, "No mail that Zulip has lost is in quarantine any more")
        number, usual = self._journal.refusals(now)
        if number > FEW and number > USUAL * usual:
            what = f"{number} mails were refused within an hour, where {usual:.1f} are usual"
            yield Cause("refused", f"{what}: zulip-email-gateway quarantine list", "No more mail than usual is refused")
        since = self._journal.waits_since()
        if since is not None and now - since > WAITS:
            what = f"Mail waits for more than {WAITS / 3600:g} hour: zulip-email-gateway status says why"
            yield Cause("waits", what, "No mail waits for long any more")
        probe = self._journal.note("probe")
        if config.addresses.probe and probe and probe["seconds"] is None:
            what = "A mail that was sent to see whether mail works was not posted: zulip-email-gateway doctor"
            yield Cause("probe", what, "The mail that was sent to see whether mail works was posted")
        until = self._journal.note("certificate until")
        if until is not None and until - now < certificate.SOON:
            what = f"The certificate that senders of mail are shown expires within {certificate.SOON // 86400} days"
            yield Cause("certificate", f"{what}: zulip-email-gateway doctor", "The certificate was renewed")

    def _post(self, text: str) -> bool:
        """True if it need not be posted any more."""
        recent = [at for at in self._journal.note("alerts sent") or [] if at > self._now - DAY]
        if len(recent) >= MOST:
            return False
        domain = self._gateway.config.pattern.domain
        mail = EmailMessage()
        mail["From"] = f"Zulip email gateway <postmaster@{domain}>"
        mail["To"] = self._gateway.config.addresses.alerts
        mail["Subject"] = "Email gateway"
        mail["Date"] = email.utils.formatdate(self._now)
        mail["Message-ID"] = email.utils.make_msgid(domain=domain)
        mail.set_content(text, cte="7bit")
        with stored(self._gateway.spool) as file:
            file.write(mail.as_bytes())
            file.flush()
            envelope = Envelope(self._gateway.config.addresses.alerts)
            verdict = self._gateway.deliver(envelope, Message(file), max_wait=_ROOM, keep_refused=False)
        if isinstance(verdict, Deferred):
            return False
        with self._journal.change() as database:
            self._journal.write_note(database, "alerts sent", [*recent, self._now])
        return True
