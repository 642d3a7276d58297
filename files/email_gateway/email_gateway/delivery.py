"""The way of one mail: address, room, hand-over, verdict.

Every door (Postfix, the quarantine's replay, the recovery, an inbox) goes
through `Gateway.deliver`; there is no other way into Zulip.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from . import addresses
from .backend import Backend, open_backend
from .config import Config
from .headers import without_zulips_headers
from .pace import Pace
from .quarantine import Quarantine
from .state import Data, State, count
from .verdict import Deferred, Delivered, Refused, Trouble, Verdict

# The cause of a mail for another domain or prefix than gateway.conf has.
OTHER_PATTERN = "other pattern"


class Envelope(NamedTuple):
    """What is known of a mail besides its text.

    uid: where an inbox has it, (which folder, UID); None for other doors.
    """

    recipient: str
    sender: str = ""
    queue_id: str = ""
    uid: tuple[str, int] | None = None


class Attempt(NamedTuple):
    """What came of trying: the verdict, the slot of the pacing that was held (None:
    none) and the endpoint that served."""

    verdict: Verdict
    slot: int | None = None
    endpoint: str | None = None


class Gateway:
    """A configured gateway; raises Trouble when the configuration is unusable."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.state = State(config.state_dir)
        self.recovered = State(config.state_dir, "recovery")
        self.pace = Pace(config, self.state, deadline=2 * config.timeout)
        self.quarantine = Quarantine(config.state_dir / "quarantine", config.quarantine_bytes, config.quarantine_days)
        # Who waits for the verdict.
        self.parent = os.getppid()

    @property
    def deadline(self) -> int:
        """Seconds that a whole delivery may take."""
        return int(self.pace.max_wait + 2 * self.config.timeout) + 10

    def deliver(self, envelope: Envelope, message: bytes, keep_refused: bool = True) -> Verdict:
        """Deliver one mail. Nothing but a Refused may end its life elsewhere.

        keep_refused: put a copy of a refused mail into the quarantine.
        """
        attempt = self._try(envelope, message)
        if isinstance(attempt.verdict, Refused) and keep_refused:
            try:
                self.quarantine.keep(message, *envelope[:3], attempt.verdict.reason)
            except Trouble as trouble:
                attempt = attempt._replace(verdict=trouble.verdict)
        verdict = attempt.verdict
        try:
            with self.state.change() as data:
                self._book(data, envelope, attempt)
        except Trouble as trouble:
            # What Zulip has accepted stays delivered, whatever the books say; the
            # slot, still open, goes on counting by itself.
            if not isinstance(verdict, Delivered):
                return trouble.verdict
            return Delivered(f"{verdict.note}, but {trouble}")
        return verdict

    def backend(self) -> Backend:
        """The way into Zulip, with the endpoint that served last."""
        return open_backend(self.config, self.state.look().get("endpoint"))

    def _try(self, envelope: Envelope, message: bytes) -> Attempt:
        try:
            address = addresses.parse(envelope.recipient, self.config.pattern)
        except addresses.NotAGatewayAddress as error:
            return Attempt(Refused("5.1.1", "no gateway address", str(error)))
        except addresses.OtherPattern as error:
            return Attempt(Deferred("4.3.5", OTHER_PATTERN, f"{error}; run playbooks/site.yml"))
        try:
            backend = self.backend()
            slot = None if address.is_reply else self.pace.acquire()
        except Trouble as trouble:
            return Attempt(trouble.verdict)
        if os.getppid() != self.parent:
            # Postfix or the service was stopped while we waited, so the mail is still
            # in the queue or the inbox: to deliver it now would be to deliver it twice.
            return Attempt(Deferred("4.3.2", "orphaned", "who asked for it was stopped while the mail waited"), slot)
        verdict = backend.hand_over(address.text, without_zulips_headers(message))
        return Attempt(verdict, slot, backend.endpoint)

    def _book(self, data: Data, envelope: Envelope, attempt: Attempt) -> None:
        """Write down what came of it, all at one stroke."""
        count(data, attempt.verdict)
        if attempt.slot is not None:
            self.pace.close(data, attempt.slot, attempt.verdict)
        if attempt.endpoint is not None:
            data["endpoint"] = attempt.endpoint
        if envelope.uid is not None and isinstance(attempt.verdict, Delivered):
            data.setdefault("accepted", []).append(envelope.uid)
