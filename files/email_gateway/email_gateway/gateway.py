"""The way of one mail: address, room, hand-over, verdict.

Whoever brings a mail (Postfix, the inbox, an operator, Zulip's file of failed mail), it
goes through `Gateway.deliver`; there is no other way into Zulip. The same mail, brought
again, gets the answer that stands in the journal.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Lock
from typing import NamedTuple

from . import addresses
from .backend import Backend, open_backend
from .config import Config
from .journal import Journal, Mail, Ticket, key_of
from .message import Message
from .pace import Pace
from .quarantine import Quarantine
from .verdict import Deferred, Delivered, Refused, Trouble, Verdict, bug

# The cause of a mail for another domain or prefix than gateway.conf has.
OTHER_PATTERN = "other pattern"
SPOOL = "spool"


class Envelope(NamedTuple):
    """What is known of a mail besides its text.

    source: postfix, inbox, zulip or operator. known_by: what tells it from all others together
    with its text; empty where it may come again as another mail.
    """

    recipient: str
    sender: str = ""
    queue_id: str = ""
    source: str = "operator"
    known_by: tuple[str, ...] = ()


class Attempt(NamedTuple):
    """What came of trying: the verdict, and the unit of the rate limit that was held (None: none)."""

    verdict: Verdict
    unit: Ticket | None = None


class Gateway:
    """A configured gateway; raises Trouble where the configuration is unusable."""

    def __init__(self, config: Config, journal: Journal) -> None:
        self.config = config
        self.journal = journal
        self.pace = Pace(config, journal)
        self.quarantine = Quarantine(config.state_dir, journal, config.quarantine_bytes, config.quarantine_days)
        self.spool = config.state_dir / SPOOL
        self.stopping = Event()
        self._backend: Backend | None = None
        self._lock = Lock()
        # Mails that are being delivered, by key: a lock, and how many threads want it.
        self._busy: dict[bytes, tuple[Lock, int]] = {}
        # What the journal could not be told.
        self._untold: list[tuple[Mail, Attempt]] = []

    def deliver(
        self, envelope: Envelope, message: Message, max_wait: float | None = None, keep_refused: bool = True
    ) -> Verdict:
        """Deliver one mail. Nothing but a Refused may end its life elsewhere.

        max_wait: seconds to wait for room within Zulip's limits, if not as configured.
        keep_refused: put a copy of a refused mail into the quarantine.
        """
        try:
            key = os.urandom(16)
            if envelope.known_by:  # in an inbox by the UID alone; a queue ID comes again
                key = key_of(*envelope.known_by, b"" if envelope.source == "inbox" else message.digest())
            mail = Mail(key, envelope.source, envelope.recipient, envelope.sender, envelope.queue_id, message.size)
            with self._alone(key):
                if verdict := self._known(key):
                    return verdict
                attempt = self._try(mail, message, self.config.max_wait if max_wait is None else max_wait)
                return self._note(mail, attempt, message if keep_refused else None)
        except (Trouble, OSError) as error:
            return _verdict(error, self.spool)

    def succeed(self, former: Gateway) -> None:
        """Take over what the gateway of the former configuration is still about."""
        self._lock, self._busy, self._untold = former._lock, former._busy, former._untold

    def backend(self) -> Backend:
        """The way into Zulip; its connections are kept."""
        with self._lock:
            if self._backend is None:
                self._backend = open_backend(self.config, self.journal.note("endpoint"))
            return self._backend

    def close(self) -> None:
        """Give up the connections to Zulip."""
        with self._lock:
            if self._backend is not None:
                self._backend.close_idle(0)

    def tidy(self) -> None:
        """What has to be done now and then."""
        while self._untold:
            self._write(*self._untold[0], None)
            del self._untold[0]
        self.pace.tidy()
        self.quarantine.tidy()
        self.journal.tidy()
        if self._backend is not None:
            self._backend.close_idle()

    @contextmanager
    def _alone(self, key: bytes) -> Iterator[None]:
        """The same mail, brought twice at the same time, is delivered once."""
        with self._lock:
            lock, number = self._busy.get(key, (Lock(), 0))
            self._busy[key] = lock, number + 1
        try:
            with lock:
                yield
        finally:
            with self._lock:
                lock, number = self._busy.pop(key)
                if number > 1:
                    self._busy[key] = lock, number - 1

    def _known(self, key: bytes) -> Verdict | None:
        if any(mail.key == key and isinstance(attempt.verdict, Delivered) for mail, attempt in self._untold):
            return Delivered("accepted by Zulip before")
        return self.journal.verdict(key)

    def _try(self, mail: Mail, message: Message, max_wait: float) -> Attempt:
        try:
            address = addresses.parse(mail.recipient, self.config.pattern)
        except addresses.NotAGatewayAddress as error:
            return Attempt(Refused("5.1.1", "no gateway address", str(error)))
        except addresses.OtherPattern as error:
            return Attempt(Deferred("4.3.5", OTHER_PATTERN, f"{error}; run playbooks/site.yml"))
        try:
            backend = self.backend()
            unit = None if address.is_reply else self.pace.acquire(max_wait, self.stopping.is_set)
        except Trouble as trouble:
            return Attempt(trouble.verdict)
        try:
            with self.journal.change() as database:
                self.journal.begin(database, mail)
            text = message.without_reserved_fields(self.spool)
        except (Trouble, OSError) as error:
            return Attempt(_verdict(error, self.spool), unit)
        try:
            return Attempt(backend.hand_over(address.text, text, self.spool), unit)
        except Exception as error:  # our own bug
            return Attempt(bug(error), unit)

    def _note(self, mail: Mail, attempt: Attempt, to_keep: Message | None) -> Verdict:
        """Write down what came of it, all at one stroke; the verdict as it is then."""
        verdict, copy = attempt.verdict, None
        if isinstance(verdict, Refused) and to_keep is not None:
            try:
                copy = self.quarantine.store(to_keep, mail, verdict.reason)
            except Trouble as trouble:
                attempt = attempt._replace(verdict=trouble.verdict)
                verdict = trouble.verdict
        try:
            self._write(mail, attempt, copy)
            if copy is not None:
                self.quarantine.grew(mail.size)
        except Trouble as trouble:
            # What Zulip has accepted stays delivered, and is not handed over again; and a unit
            # is given back as soon as that can be written.
            if isinstance(verdict, Delivered) or attempt.unit is not None:
                self._untold.append((mail, attempt))
            return Delivered(f"{verdict.note}, but {trouble}") if isinstance(verdict, Delivered) else trouble.verdict
        return verdict

    def _write(self, mail: Mail, attempt: Attempt, copy: str | None) -> None:
        verdict = attempt.verdict
        # Only what is final must survive a power cut: all else is tried again anyway.
        with self.journal.change(sync=not isinstance(verdict, Deferred)) as database:
            self.journal.finish(database, mail, verdict, copy)
            self.pace.close(database, attempt.unit, verdict)
            if self._backend is not None and self._backend.endpoint != self.journal.note("endpoint"):
                self.journal.write_note(database, "endpoint", self._backend.endpoint)


def _verdict(error: Exception, folder: Path) -> Deferred:
    if isinstance(error, Trouble):
        return error.verdict
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return Deferred("4.3.0", "spool", f"cannot store a message in {folder}: {reason}; look at its free space")
