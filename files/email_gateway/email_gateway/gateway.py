"""The way of one mail: address, rate limit, hand-over, verdict.

Whoever brings a mail (Postfix, the inbox, an operator, Zulip's file of failed mail), it
goes through `Gateway.deliver`; there is no other way into Zulip. The same mail, brought
again, gets the answer that stands in the journal.
"""

from __future__ import annotations

import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from threading import Event, Lock
from typing import NamedTuple

from . import admission, sender_checks
from .address_book import stale
from .addresses import Address, NotAGatewayAddress, OtherPattern
from .automatic import is_automatic_reply, loop
from .backend import Backend, open_backend
from .backlog import STALE, Backlog
from .config import Config
from .forgery import forged
from .journal import REPLIES, Flight, Journal, Mail, Ticket, address_of, key_of
from .mail_parts import Unsure
from .marked import marked
from .message import Message
from .outcome import Outcomes
from .pace import Pace
from .postable import postable
from .quarantine import Quarantine
from .senders import authors
from .verdict import (
    ACCEPTED,
    DROPPED,
    NO_TEXT,
    POSTED,
    STOPPING,
    UNKNOWN_ADDRESS,
    WAITING,
    Deferred,
    Delivered,
    Refused,
    Trouble,
    Verdict,
    bug,
)

# The cause of a mail for another domain or prefix than gateway.conf has.
OTHER_PATTERN = "other pattern"
# The cause of a mail of which an inbox has several copies.
COPY = "copy"
SPOOL = "spool"
# A mail that Zulip fails with is given up after so many times: each takes another's place in the rate limit.
_TRIES = 3
# A mail waits for its turn so long (seconds), while Zulip's worker is busy with another one or
# stopped, also where it had to wait for the rate limit; a question so long, then the mail is accepted without it.
_TURN, _LEAST_TURN, _TURN_TO_ASK = 120.0, 15.0, 0.5
_NO_WARNING = Refused(
    "5.7.1", "sender check", "its sender may be forged, and it is made in a way that no warning can be put into it"
)
# By these a quotation is known, near the beginning of a mail (bytes).
_QUOTED, _NEAR = re.compile(rb"(?im)^>|<blockquote|gmail_quote"), 2**18


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
    """What came of trying: the verdict, and the unit of the rate limit that was held (None: none).

    flight: the hand-over, where the worker's log tells what becomes of it; is_logged: it does so
    of the unit, too, as Zulip has the mail.
    """

    verdict: Verdict
    unit: Ticket | None = None
    flight: Flight | None = None
    is_logged: bool = False


class Question(NamedTuple):
    """Whether Zulip knows an address, and what came of asking."""

    address: Address
    attempt: Attempt


class Gateway:
    """A configured gateway; raises Trouble where the configuration is unusable."""

    def __init__(self, config: Config, journal: Journal) -> None:
        self.config = config
        self.journal = journal
        self.pace = Pace(config, journal)
        self.outcomes = Outcomes(config.logs, journal, config.hosts == 1)
        self.quarantine = Quarantine(config.state_dir, journal, config.quarantine_bytes, config.quarantine_days)
        self.backlog = Backlog(journal)
        self.spool = config.state_dir / SPOOL
        self.stopping = Event()
        self._backend: Backend | None = None
        self._lock = Lock()
        # Mails that are being delivered, by key: a lock, and how many threads want it.
        self._busy: dict[bytes, tuple[Lock, int]] = {}
        # What the journal could not be told.
        self._unwritten: list[tuple[Mail, Attempt]] = []
        self._unanswered: list[Question] = []

    def deliver(
        self, envelope: Envelope, message: Message, max_wait: float | None = None, keep_refused: bool = True
    ) -> Verdict:
        """Deliver one mail. Nothing but a Refused may end its life elsewhere.

        max_wait: seconds to wait for Zulip's rate limit, if not as configured.
        keep_refused: put a copy of a refused mail into the quarantine.
        """
        try:
            key = os.urandom(16)
            if envelope.known_by:  # in an inbox by the UID alone; a queue ID comes again
                key = key_of(*envelope.known_by, b"" if envelope.source == "inbox" else message.digest())
            mail = Mail(
                *(key, envelope.source, envelope.recipient, envelope.sender, envelope.queue_id, message.size),
                self._content(envelope, message),
            )
            is_brought = envelope.source == "postfix"
            brought = self.backlog.brought(self._address_of(envelope.recipient)) if is_brought else nullcontext()
            with self._alone(key), brought:
                self._write_again(key)
                if verdict := self.journal.verdict(key):
                    return verdict
                if mail.content is not None and self.journal.has_posted(mail.content):
                    attempt = Attempt(Delivered("a copy of a mail that was posted before", COPY))
                else:
                    attempt = self._try(mail, message, self.config.max_wait if max_wait is None else max_wait)
                return self._note(mail, attempt, message, keep_refused)
        except (Trouble, OSError) as error:
            return _verdict(error, self.spool)

    def _content(self, envelope: Envelope, message: Message) -> bytes | None:
        """A provider may keep a copy of a mail for each of its recipients, all in the same inbox."""
        fingerprint = message.fingerprint() if envelope.source == "inbox" else None
        token = self.config.addresses.token_of(envelope.recipient)
        return None if fingerprint is None else key_of("content", token, fingerprint)

    def succeed(self, former: Gateway) -> None:
        """Take over what the gateway of the former configuration is still about."""
        self._lock, self._busy, self._unwritten = former._lock, former._busy, former._unwritten
        self._unanswered = former._unanswered
        self.outcomes, self.backlog = former.outcomes, former.backlog
        self.outcomes.follow(self.config.logs, self.config.hosts == 1)

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

    def tidy(self) -> list[str]:
        """What has to be done now and then; what the operator has to be told."""
        self._write_again()
        for question in list(self._unanswered):
            self._answered(question)
            self._unanswered.remove(question)
        self.outcomes.tidy()
        self.backlog.tidy()
        self.pace.tidy()
        self.quarantine.tidy()
        self.journal.tidy(self.config.history_mails)
        if self._backend is not None:
            self._backend.close_idle()
        return self.quarantine.tidy_lost()

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

    def _write_again(self, key: bytes | None = None) -> None:
        """Write what could not be written, of this mail or of all; raises Trouble."""
        for entry in [entry for entry in self._unwritten if key in (None, entry[0].key)]:
            self._write(*entry, None)
            self._unwritten.remove(entry)

    def _outcome(self, flight: Flight, is_stopping: Callable[[], bool]) -> Attempt:
        return Attempt(self.outcomes.wait(flight, is_stopping), flight.unit, flight, is_logged=True)

    def _try(self, mail: Mail, message: Message, max_wait: float) -> Attempt:
        try:
            if verdict := self._not_admitted(mail, message):
                return Attempt(verdict)
            address = self.config.addresses.parse(mail.recipient)
        except NotAGatewayAddress as error:
            return Attempt(Refused("5.1.1", "no gateway address", str(error)))
        except OtherPattern as error:
            return Attempt(Deferred("4.3.5", OTHER_PATTERN, f"{error}; run playbooks/site.yml"))
        if verdict := self._unwanted(mail, address, message):
            return Attempt(verdict)
        end = time.monotonic() + max_wait
        failures = self.journal.fails_alone(mail.key)
        flight = self.outcomes.flight(mail.key)
        if flight is not None:  # the service was restarted meanwhile
            attempt = self._outcome(flight, self.stopping.is_set)
        else:
            attempt = self._to(address, mail, message, end)
        if attempt.verdict.cause == NO_TEXT and (with_quotes := keeping_quotes(address, message)):
            if attempt.flight is not None:
                self.outcomes.forget(attempt.flight)
            again = self._to(with_quotes, mail, message, end)
            attempt = again if again.flight is not None else again._replace(flight=attempt.flight)
        return attempt._replace(verdict=stale(address, _given_up(attempt.verdict, failures)))

    def _unwanted(self, mail: Mail, address: Address, message: Message) -> Verdict | None:
        """What can be said of a mail without Zulip."""
        if why := forged(message):
            return Refused("5.6.0", "forged log", f"it would write into Zulip's log: {why}")
        if not address.is_reply:
            why = loop(message, self.config.addresses.domains)
            return Refused("5.4.6", "loop", f"a mail loop: {why}") if why else None
        if not self.config.post_automatic and is_automatic_reply(message, mail.sender, mail.source == "postfix"):
            return Delivered("an automatic reply, which is not posted", DROPPED)
        return None

    def _not_admitted(self, mail: Mail, message: Message) -> Verdict | None:
        """Why its senders may not write there. What an operator delivers, he wants; an inbox has no envelope."""
        if mail.source not in ("postfix", "inbox"):
            return None
        envelope = mail.sender if mail.source == "postfix" else None
        verdict = admission.verdict(self.config, mail.recipient, envelope, message)
        # That DNS did not answer when the mail came: it will not be asked again (see _warned).
        return None if isinstance(verdict, Deferred) else verdict

    def _warning(self, mail: Mail, message: Message) -> str:
        """What to put in front of its text, if its sender may be forged. An inbox's provider has checked him."""
        if self.config.sender_checks == sender_checks.OFF or mail.source == "inbox":
            return ""
        return sender_checks.warning(sender_checks.findings(message.header(), authors(message)))

    def _warned(self, mail: Mail, text: Message, line: str) -> Message:
        """The mail with a line in front of its text; raises OSError, and Unsure where that cannot be done."""
        try:
            return marked(text, line, self.spool)
        except Unsure:
            if mail.source == "postfix":
                raise
            return text  # an operator has looked at it, or Zulip had it before

    def _to(self, address: Address, mail: Mail, message: Message, end: float) -> Attempt:
        """Hand a mail over, once the rate limit admits it."""
        try:
            self.backend()
            seconds = end - time.monotonic()
            unit = self._unit(address, seconds)
        except Trouble as trouble:
            return Attempt(trouble.verdict)
        try:
            text = postable(message, self.spool)
            if line := self._warning(mail, message):
                text = self._warned(mail, text, line)
                # It would be all that is left of a mail of nothing but quotations.
                address = keeping_quotes(address, message) or address
            text = text.without_reserved_fields(self.spool)
            if self.outcomes.are_known:
                return self._followed(mail, address, text, unit, end)
            with self.journal.change() as database:
                self.journal.begin(database, mail)
        except Unsure:
            return Attempt(_NO_WARNING, unit)
        except (Trouble, OSError) as error:
            return Attempt(_verdict(error, self.spool), unit)
        except Exception as error:  # our own bug must not keep the place
            return Attempt(bug(error), unit)
        return Attempt(self._hand_over(address.text, text), unit)

    def _unit(self, address: Address, seconds: float) -> Ticket | None:
        """A place in the rate limit, which a reply does not need; raises Trouble."""
        if address.is_reply:
            return None
        return self.pace.acquire(address_of(address.token), seconds, self.stopping.is_set)

    def knows(self, address: Address) -> Verdict:
        """Ask Zulip whether it knows an address, and count what that costs; raises Trouble."""
        unit = self._unit(address, 0)
        verdict: Verdict = Deferred("4.3.0", "question", "not asked")
        flight, is_logged = None, False
        try:
            backend = self.backend()
            if self.config.worker_counts and self.outcomes.are_known:  # then its worker tells of it
                with self.outcomes.turn(address.is_reply, _TURN_TO_ASK, self.stopping.is_set):
                    flight = self.outcomes.begin(None, address, unit)
                    verdict = backend.knows(address.text, self.spool)
                    is_logged = self.outcomes.handed(flight, verdict)
            else:
                verdict = backend.knows(address.text, self.spool)
        finally:
            if flight is not None and not is_logged:
                self.outcomes.forget(flight)
            question = Question(address, Attempt(verdict, unit, flight, is_logged))
            try:
                self._answered(question)
            except Trouble:
                self._unanswered.append(question)
                raise
        return verdict

    def _answered(self, question: Question) -> None:
        """Write down what a question has cost; raises Trouble."""
        verdict, unit, flight, is_logged = question.attempt
        with self.journal.change() as database:
            self.pace.close(database, unit, verdict, is_logged)
            if flight is not None and not is_logged:
                self.journal.close_flight(database, flight)
            self._learn(database, question.address.text, verdict)

    def _learn(self, database: sqlite3.Connection, recipient: str, verdict: Verdict) -> None:
        """Whether Zulip knows an address. Of what it was not given it has said nothing."""
        if isinstance(verdict, Delivered) and verdict.cause != DROPPED:
            self.journal.learn(database, self._address_of(recipient))
        elif verdict.cause == UNKNOWN_ADDRESS:
            self.journal.unlearn(database, self._address_of(recipient))

    def _address_of(self, recipient: str) -> bytes:
        return address_of(self.config.addresses.token_of(recipient))

    def _followed(self, mail: Mail, address: Address, text: Message, unit: Ticket | None, end: float) -> Attempt:
        """Hand a mail over, before `end`, and wait for what Zulip's worker tells of it."""
        seconds = max(min(end - time.monotonic(), _TURN), _LEAST_TURN)
        with self.outcomes.turn(address.is_reply, seconds, self.stopping.is_set):
            flight = self.outcomes.begin(mail, address, unit)
            verdict = self._hand_over(address.text, text)
            is_with_zulip = self.outcomes.handed(flight, verdict)
        # Whoever brings a mail by hand could not ask for it again.
        is_stopping = self.stopping.is_set if mail.source != "operator" else lambda: False
        return self._outcome(flight, is_stopping) if is_with_zulip else Attempt(verdict, unit, flight)

    def _count_posted(self, database: sqlite3.Connection, mail: Mail, flight: Flight | None) -> None:
        address = self._address_of(mail.recipient)
        is_reply = self.config.addresses.token_of(mail.recipient).startswith("mm")
        channel = REPLIES if is_reply else flight.text if flight else self.journal.place(address)
        at = (flight.at if flight else None) or time.time()
        self.journal.add_posted(database, mail.key, address, mail.queue_id, channel, at)

    def _hand_over(self, recipient: str, text: Message) -> Verdict:
        try:
            return self.backend().hand_over(recipient, text, self.spool)
        except Exception as error:  # our own bug
            return bug(error)

    def _note(self, mail: Mail, attempt: Attempt, message: Message, keep_refused: bool) -> Verdict:
        """Write down what came of it, all at one stroke; the verdict as it is then."""
        verdict, copy = attempt.verdict, None
        if verdict.cause == STOPPING and attempt.is_logged:
            return verdict  # Zulip has it, and it will be asked for again
        try:
            if isinstance(verdict, Refused) and keep_refused:
                copy = self.quarantine.store(message, mail, verdict.reason)
            elif isinstance(verdict, Delivered) and verdict.cause == WAITING:
                copy = self.quarantine.store(message, mail, verdict.note, lost=True)
        except Trouble as trouble:
            if verdict.cause == WAITING:
                return trouble.verdict  # the mail stays where it is, and its outcome will be asked for again
            attempt = attempt._replace(verdict=trouble.verdict)
            verdict = trouble.verdict
        try:
            self._write(mail, attempt, copy)
            if copy is not None and verdict.cause != WAITING:
                self.quarantine.grew(mail.size)
        except Trouble as trouble:
            if copy is not None:
                self.quarantine.discard(copy)
            if verdict.cause == WAITING:
                return trouble.verdict
            if isinstance(verdict, Refused):
                attempt = attempt._replace(verdict=trouble.verdict)
            # What Zulip has accepted stays delivered, and is not handed over again; and a unit
            # is given back as soon as that can be written.
            if isinstance(verdict, Delivered) or attempt.unit is not None or attempt.flight is not None:
                self._unwritten.append((mail, attempt))
            verdict = Delivered(f"{verdict.note}, but {trouble}") if isinstance(verdict, Delivered) else trouble.verdict
        if attempt.flight is not None and verdict.cause != WAITING:
            self.outcomes.forget(attempt.flight)
        return verdict

    def _write(self, mail: Mail, attempt: Attempt, copy: str | None) -> None:
        verdict, flight = attempt.verdict, attempt.flight
        # Only what is final must survive a power cut: all else is tried again anyway.
        with self.journal.change(sync=not isinstance(verdict, Deferred)) as database:
            self.journal.finish(database, mail, verdict, copy, lost=verdict.cause == WAITING)
            self.pace.close(database, attempt.unit, verdict, attempt.is_logged)
            self._learn(database, mail.recipient, verdict)
            if isinstance(verdict, Delivered) and verdict.cause in (POSTED, ACCEPTED):
                self._count_posted(database, mail, flight)
            if mail.source == "postfix":
                is_final = not isinstance(verdict, Deferred)
                self.journal.dequeue(database, self._address_of(mail.recipient), mail.queue_id, is_final, STALE)
            if flight is not None and verdict.cause == WAITING:
                self.journal.save_flight(database, replace(flight, copy=copy))
            elif flight is not None:
                self.journal.close_flight(database, flight)
            if self._backend is not None and self._backend.endpoint != self.journal.note("endpoint"):
                self.journal.write_note(database, "endpoint", self._backend.endpoint)
        if flight is not None:
            flight.copy = copy if verdict.cause == WAITING else None


def _given_up(verdict: Verdict, failures: int) -> Verdict:
    """Zulip fails with this mail each time, and not with others: then it is the mail."""
    if not isinstance(verdict, Deferred) or not verdict.counted or failures < _TRIES - 1:
        return verdict
    why = f"Zulip has failed with it {_TRIES} times, and not with others"
    return Refused("5.3.0", "fails in Zulip", f"{why}: {verdict.reason}")


def keeping_quotes(address: Address, message: Message) -> Address | None:
    """Where to send a mail again in which Zulip has found nothing but quotations, with its option to
    keep them; None if that cannot help. Replies have no options."""
    local, _, domain = address.text.rpartition("@")
    is_quoted = any(_QUOTED.search(piece) for piece in message.between(0, _NEAR))
    if address.is_reply or not is_quoted or "include-quotes" in local:
        return None
    return address._replace(text=f"{local}.include-quotes@{domain}")


def _verdict(error: Exception, folder: Path) -> Deferred:
    if isinstance(error, Trouble):
        return error.verdict
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return Deferred("4.3.0", "spool", f"cannot store a message in {folder}: {reason}; look at its free space")
