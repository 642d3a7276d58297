"""What an operator has to know is posted in Zulip, once for each cause, and once more when it is over.

By the way that all mail goes, and so only while that works: what goes on without Zulip is for doctor and the
metrics. What cannot be posted is tried less and less, and each cause is told of twice a day at most.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from . import certificate
from .gateway import Envelope, Gateway
from .message import Message, stored
from .own_mail import own_mail
from .verdict import Delivered, Verdict

# Each cause so often a day at most (seconds).
MOST, DAY = 2, 86400.0
# What waits longer is told (seconds).
WAITS = 3600.0
# Refusals within two hours: more than these, and than so many times the usual number.
FEW, USUAL = 20, 4
# Others wait for this one to end: seconds for Zulip's rate limit.
_MAX_WAIT = 5.0


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

    def run(self) -> tuple[list[str], Verdict | None]:
        """Post what is new and what is over: a line for each, and why the rest has to wait. Raises Trouble."""
        if not self._gateway.config.addresses.alerts:
            return [], None
        told: dict[str, str] = self._journal.note("alerts") or {}
        causes = {cause.name: cause for cause in self._causes(told)}
        said: list[str] = []
        for name in sorted(causes.keys() ^ told.keys()):
            is_new = name in causes
            if is_new and not self._may_be_told(name):
                continue
            text = causes[name].text if is_new else told[name]
            verdict = self._post(text)
            if not isinstance(verdict, Delivered):
                return said, verdict
            said.append(f"alert: {text}")
            if is_new:
                told[name] = causes[name].over
            else:
                del told[name]
            self._note("alerts", told)
            if is_new:
                self._note("alerts sent", {**self._sent(), name: [*self._sent().get(name, []), self._now]})
        return said, None

    def _note(self, name: str, value: object) -> None:
        with self._journal.change() as database:
            self._journal.write_note(database, name, value)

    def _sent(self) -> dict[str, list[float]]:
        """When each cause was told of within a day."""
        sent: dict[str, list[float]] = self._journal.note("alerts sent") or {}
        return {name: [at for at in times if at > self._now - DAY] for name, times in sent.items()}

    def _may_be_told(self, name: str) -> bool:
        return len(self._sent().get(name, [])) < MOST

    def _causes(self, told: Mapping[str, str]) -> Iterator[Cause]:
        """What is wrong now. told: what was posted, and is not over."""
        config, now = self._gateway.config, self._now
        _, lost, _ = self._journal.number_of_copies()
        if lost:
            what = f"Zulip has accepted {lost} mails and not posted them; copies are in quarantine"
            text = f"{what}: zulip-email-gateway quarantine list, then replay ID"
            yield Cause("lost", text, "No mail that Zulip has lost is in quarantine any more")
        number, usual = self._journal.refusals(now)
        if number > FEW and number > USUAL * usual:
            what = f"{number} mails were refused within two hours, where {usual:.1f} are usual"
            yield Cause("refused", f"{what}: zulip-email-gateway quarantine list", "No more mail than usual is refused")
        since = self._journal.waits_since()
        if since is not None and now - since > WAITS:
            what = f"Mail waits for more than {WAITS / 3600:g} hour: zulip-email-gateway status says why"
            yield Cause("waits", what, "No mail waits for long any more")
        probe = self._journal.note("probe")
        if config.addresses.probe and probe and probe["seconds"] is None:
            what = "A mail that was sent to see whether mail works was not posted in time: zulip-email-gateway doctor"
            yield Cause("probe", what, "The mail that was sent to see whether mail works was posted")
        until = self._journal.note("certificate until")
        if until is None and "certificate" in told:  # that nobody knows is no end
            yield Cause("certificate", "", told["certificate"])
        if until is not None and until - now < certificate.SOON:
            what = f"The certificate that senders of mail are shown expires within {certificate.SOON // 86400} days"
            yield Cause("certificate", f"{what}: zulip-email-gateway doctor", "The certificate was renewed")

    def _post(self, text: str) -> Verdict:
        recipient = self._gateway.config.addresses.alerts
        mail = own_mail(self._gateway.config.pattern.domain, recipient, "Email gateway", text)
        with stored(self._gateway.spool) as file:
            file.write(mail.as_bytes())
            file.flush()
            envelope = Envelope(recipient)
            return self._gateway.deliver(envelope, Message(file), max_wait=_MAX_WAIT, keep_refused=False)
