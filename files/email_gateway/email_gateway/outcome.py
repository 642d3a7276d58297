"""What became of a mail inside Zulip, by the log of its worker.

Zulip's answer to a hand-over means only that the mail is in RabbitMQ. Its worker takes
mails out in the order in which they went in, and writes a line about each. So hand-overs
are made one at a time, and a line belongs to the first of the mails under way that it can
be about; of mail to channels only one is under way at a time. Lines that are about none of
them are of other producers.

While a line is overdue, as long as the worker is stopped, nothing more is handed over, but
for one mail a minute. Should only its line come, Zulip has lost the ones before it.

A mail that the worker failed with is gone, unless the worker ends because of it (its
database connection broke): then RabbitMQ gives the next worker the same mail.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Condition

from . import worker_log
from .addresses import Address
from .journal import RETENTION, Flight, Journal, Mail, Ticket, address_of
from .verdict import (
    DROPPED,
    NO_TEXT,
    POSTED,
    RATE_LIMITED,
    STOPPING,
    WAITING,
    Deferred,
    Delivered,
    Refused,
    Trouble,
    Verdict,
)
from .worker_log import Follower, Line, Position

# A line comes within this time (seconds), or the worker is stopped.
PROMPT = 10.0
# The same for a mail of which it is not known whether Zulip has it.
DOUBTFUL = 2.0
# The worker says within this time (seconds) of failing with a mail that it ends.
_SAYS_SO = 3.0
# When lines are overdue, all that will come has come after this silence (seconds): a mail
# takes 30 s at most (zerver/worker/base.py), and a restart of the worker about as long.
_QUIET = 45.0
# With a line overdue one more mail goes after this time (seconds).
_ONE_MORE = 60.0
# A line that names no channel may be about another producer's mail: one that names ours, or by
# which the mail is tried again, is the better one within this time (seconds).
_SECOND_THOUGHT = 0.5
# What was told before a mail is read first, but in so many looks at most (worker_log._MOST_AT_ONCE each).
_MOST_LOOKS = 50
# How often to look at the log while somebody waits for a line, or for a turn (seconds).
_LOOK, _PAUSE = 0.01, 0.25

_ONLY_REPLIES = (worker_log.REPLY_POSTED, worker_log.INACTIVE, worker_log.AUTOMATIC)
_ONLY_CHANNELS = (worker_log.POSTED, worker_log.NOT_ALLOWED, worker_log.RATE_LIMITED)
_NAMELESS = (worker_log.NO_TEXT, worker_log.NO_BODY, worker_log.TIMED_OUT, worker_log.GONE)

# What the worker says of a question.
_ANSWERS = (worker_log.NO_TEXT, worker_log.NO_BODY)
# When a question was handed over of which it is not known whether Zulip has it: it holds up nobody,
# and what is said of it so long (seconds) is about nobody else.
IN_DOUBT, _DOUBTED = 0.0, 600.0

# Zulip has posted what it was given later, and said nothing of this mail.
LOST = "lost"

_REFUSED = {
    worker_log.NO_TEXT: ("5.6.0", NO_TEXT, "Zulip finds no text in it, or nothing but quoted text"),
    worker_log.NO_BODY: ("5.6.0", NO_TEXT, "Zulip finds no text in it"),
    worker_log.NOT_ALLOWED: ("5.7.1", "not allowed", "Zulip does not let it be posted there"),
    worker_log.INACTIVE: (
        "5.2.1",
        "inactive user",
        "the Zulip user whom this address was made for is deactivated",
    ),
    worker_log.GONE: ("5.1.1", "unknown address", "the address is gone; please copy the address from Zulip again"),
}
_TROUBLE = {
    worker_log.RATE_LIMITED: ("4.7.28", RATE_LIMITED, "Zulip's rate limit is used up, by its own account"),
    worker_log.TIMED_OUT: ("4.3.2", "Zulip's time limit", "it took Zulip's worker too long; is Zulip slow?"),
    worker_log.FAILED: ("4.3.0", "failed in Zulip", "Zulip's worker failed with it; look at its errors.log"),
    LOST: ("4.3.0", "lost in Zulip", "Zulip has posted what it was given later, and said nothing of this mail"),
}


class Outcomes:
    """Follows the mail that Zulip has; for several threads.

    folder: of Zulip's logs. counts_others: other producers' mail takes places in the rate
    limit; else each host has a share of its own.
    """

    def __init__(self, folder: Path, journal: Journal, counts_others: bool) -> None:
        self._folder = folder
        self._journal = journal
        self._counts_others = counts_others
        self._log = Follower(folder, position=_position(journal.note("worker log")))
        self._errors = Follower(folder, (worker_log.ERRORS,), _position(journal.note("errors log")))
        self._changed = Condition()
        self._is_handing = False
        self._flights = journal.flights()
        # By mail under way: a line that names another channel than Zulip did the last time.
        self._misnamed: dict[bytes, Line] = {}
        # What was read and is not yet given to a mail; since when nothing came (monotonic).
        self._lines: list[Line] = []
        self._last_line = 0.0
        self._not_queued: Line | None = None
        self._restarts: list[float] = []
        # What the journal does not have yet: mails, when others' were consumed, addresses of failed mail.
        self._unsaved: list[Flight] = []
        self._others: list[float] = []
        self._failures: list[bytes] = []

    @property
    def are_known(self) -> bool:
        """True if the worker's log can be read."""
        return worker_log.find(self._folder) is not None

    def follow(self, folder: Path, counts_others: bool) -> None:
        """Go on as gateway.conf says now."""
        with self._changed:
            self._counts_others = counts_others
            if folder != self._folder:
                self._folder = folder
                self._log, self._errors = Follower(folder), Follower(folder, (worker_log.ERRORS,))

    def flight(self, key: bytes) -> Flight | None:
        """The mail with this key, if it is under way."""
        with self._changed:
            return next((flight for flight in self._flights if flight.key == key), None)

    @contextmanager
    def turn(self, is_reply: bool, seconds: float, is_stopping: Callable[[], bool]) -> Iterator[None]:
        """Wait until a mail may be handed over, and let nobody else; raises Trouble."""
        end = time.monotonic() + seconds
        with self._changed:
            while not self._may_go(is_reply):
                if is_stopping():
                    raise Trouble("4.3.2", STOPPING, "the gateway is being stopped or restarted")
                if time.monotonic() > end:
                    raise self._too_long()
                self._changed.wait(_PAUSE)
                self.read_log()
            self._is_handing = True
        try:
            yield
        finally:
            with self._changed:
                self._is_handing = False
                self._changed.notify_all()

    def begin(self, mail: Mail | None, address: Address, unit: Ticket | None) -> Flight:
        """A mail is about to be handed over, within a turn, or an empty one (None), to ask for its
        address; raises Trouble."""
        with self._changed:
            self._catch_up()  # what stands there now is not about it
            with self._journal.change() as database:
                if mail is not None:
                    self._journal.begin(database, mail)
                if self._journal.note("worker log") is None:  # a start goes on from here
                    self._write_positions(database)
                key, copy = (os.urandom(16), "") if mail is None else (mail.key, None)
                flight = self._journal.open_flight(
                    database, key, address_of(address.token), address.is_reply, unit, copy
                )
            self._flights.append(flight)
        return flight

    def handed(self, flight: Flight, verdict: Verdict) -> bool:
        """What Zulip said; False if it does not have the mail. In doubt the line about it tells."""
        if isinstance(verdict, Delivered):
            flight.handed = time.time()
            self._save(flight)
            return True
        if isinstance(verdict, Deferred) and verdict.in_doubt and self._told(flight, DOUBTFUL):
            return True
        if isinstance(verdict, Deferred) and verdict.in_doubt and flight.is_question:
            flight.handed = IN_DOUBT
            self._save(flight)
            return True
        with self._changed:
            if flight.kind and Line(0, flight.kind).counts:  # another producer's, then
                self._others.append(flight.at or time.time())
            self.forget(flight)
        return False

    def wait(self, flight: Flight, is_stopping: Callable[[], bool]) -> Verdict:
        """What became of a mail; that it waits, if that is not told in time."""
        if self._told(flight, PROMPT, is_stopping):
            return verdict_of(flight)
        if is_stopping():
            return Deferred("4.3.2", STOPPING, "the gateway is being stopped or restarted")
        return Delivered("accepted by Zulip, whose worker has not posted it yet", WAITING)

    def forget(self, flight: Flight) -> None:
        """The outcome is dealt with, also in the journal."""
        with self._changed:
            self._flights = [one for one in self._flights if one is not flight]
            misnamed = self._misnamed.pop(flight.key, None)
            self._others += [] if misnamed is None else [misnamed.at]
            self._changed.notify_all()

    def late(self) -> list[Flight]:
        """Those with a copy, whose outcome is known now."""
        self.read_log()
        with self._changed:
            return [flight for flight in self._flights if flight.copy and flight.kind]

    def after_a_start(self) -> None:
        """What was being handed over when the service was killed: with Zulip, if there is a line about it."""
        with suppress(Trouble):
            self._catch_up()
        for flight in [flight for flight in self._flights if flight.handed is None and not flight.kind]:
            if not self._told(flight, DOUBTFUL):
                with self._journal.change() as database:
                    self._journal.close_flight(database, flight)
                self.forget(flight)

    def has_failed(self, address: bytes, when: float) -> bool:
        """A mail stands in Zulip's file of failed mail, since that time (Unix seconds): True if it is taken
        care of here. address: see address_of."""
        self.read_log()
        with self._changed, self._journal.change() as database:
            if self._journal.is_expected_failure(database, address):
                return True
            for flight in self._flights:
                is_logged = flight.kind or flight.failed is not None
                if flight.address == address and flight.begun <= when + 1 and not is_logged:
                    flight.failed = time.time()
                    self._journal.save_flight(database, flight)
                    return True
            return self._restarted(when)  # RabbitMQ gives it again

    def _catch_up(self) -> None:
        """Read all that the worker has told so far; raises Trouble."""
        for _ in range(_MOST_LOOKS):
            self.read_log()
            if not (self._log.is_behind or self._errors.is_behind):
                return
        what = "Zulip's log has grown by much, and is still being read"
        raise Trouble("4.3.2", "worker log", f"{what}; look at: ls -l {self._folder}")

    def read_log(self) -> None:
        """Read what the worker has told since, and write down whom it is about."""
        with self._changed:
            for line in (*self._log.read(), *self._errors.read()):
                self._take(line)
            self._assign()
            self._decide()
            if self._unsaved or self._others or self._failures:
                with suppress(Trouble):  # else next time
                    self._write()
                self._changed.notify_all()

    def tidy(self) -> None:
        """Note how far the log was read, so that a start goes on there; and forget those outcomes that
        nobody has asked for. Raises Trouble."""
        with self._changed:
            self.read_log()
            self._write()
            old, doubted = time.time() - RETENTION, time.time() - _DOUBTED
            for flight in [
                one
                for one in self._flights
                if (one.kind and one.copy is None and (one.at or 0) < old)
                or (one.handed == IN_DOUBT and one.begun < doubted)
            ]:
                with self._journal.change() as database:
                    if flight.unit is not None and not flight.kind:  # in doubt, and nothing was said of it
                        self._journal.settle_unit(database, flight.unit, flight.begun)
                    self._journal.close_flight(database, flight)
                self.forget(flight)

    def keep(self) -> None:
        """Before the end, write down what is under way: the journal may be new meanwhile. Raises Trouble."""
        with self._changed:
            self.read_log()
            with self._journal.change() as database:
                for flight in self._flights:
                    self._journal.keep_flight(database, flight)
                self._write_positions(database)

    def _write(self) -> None:
        with self._journal.change() as database:
            self._write_all(database)
        self._unsaved, self._others, self._failures = [], [], []
        self._flights = [flight for flight in self._flights if not (flight.is_question and flight.kind)]

    def _write_all(self, database: sqlite3.Connection) -> None:
        now = time.time()
        for flight in self._unsaved:
            self._journal.save_flight(database, flight)
            if flight.kind == worker_log.POSTED:
                self._journal.learn(database, flight.address, flight.text)
            if flight.unit is not None and flight.kind:
                self._journal.settle_unit(
                    database, flight.unit, None if flight.kind == worker_log.RATE_LIMITED else flight.at
                )
            if flight.is_question and flight.kind:
                self._journal.close_flight(database, flight)
        for at in self._others if self._counts_others else ():
            self._journal.add_another(database, min(at, now))
        for address in self._failures:
            self._journal.expect_failure(database, address)
        self._write_positions(database)

    def _write_positions(self, database: sqlite3.Connection) -> None:
        if self._lines or self._misnamed or self._not_queued:
            return  # a start has to read them again
        for name, follower in (("worker log", self._log), ("errors log", self._errors)):
            if follower.position is not None and _position(self._journal.note(name)) != follower.position:
                self._journal.write_note(database, name, follower.position)

    def _take(self, line: Line) -> None:
        if line.kind == worker_log.RESTARTS:
            self._restarts = [*self._restarts[-9:], line.at]
        elif line.kind == worker_log.NOT_QUEUED:
            self._not_queued = line
        else:
            before, self._not_queued = self._not_queued, None
            is_posted = line.kind in (worker_log.POSTED, worker_log.REPLY_POSTED)
            if is_posted and before is not None and line.at <= before.at + _SAYS_SO:
                line = line._replace(kind=worker_log.NOT_ALLOWED, text=before.text)
            self._lines.append(line)
            self._last_line = time.monotonic()

    def _assign(self) -> None:
        """Give each line to the mail it is about."""
        if not self._lines:
            return
        waiting = sum(not flight.kind and flight.handed != IN_DOUBT for flight in self._flights)
        is_short = self._overdue() and len(self._lines) < waiting
        if is_short and time.monotonic() - self._last_line < _QUIET:
            return
        # With too few lines Zulip has lost the first ones.
        lines, flights = (self._lines[::-1], self._flights[::-1]) if is_short else (self._lines, self._flights)
        for line in lines:
            # Where both may be meant, it is rather about a question than about a mail.
            ordered = sorted(flights, key=lambda one: not one.is_question) if line.kind in _ANSWERS else flights
            flight = next((flight for flight in ordered if self._fits(line, flight)), None)
            if flight is None and line.counts and line not in self._misnamed.values():
                self._others.append(line.at)
            elif flight is not None:
                self._give(line, flight)
        if is_short:
            self._give_up_those_before()
        self._lines = []

    def _fits(self, line: Line, flight: Flight) -> bool:
        place = self._place(flight)
        is_named = line.kind == worker_log.POSTED and place != ""
        if flight.kind:  # given a line that may be another's
            recent = time.time() - (flight.at or 0) < _SECOND_THOUGHT
            is_better = (is_named and line.text == place) or (place != "" and line.kind == worker_log.RATE_LIMITED)
            return recent and flight.kind in _NAMELESS and is_better
        if flight.failed is not None and not self._restarted(flight.failed):
            return is_named and line.text == place  # another producer's has failed
        if line.kind in (_ONLY_CHANNELS if flight.is_reply else _ONLY_REPLIES):
            return False
        if line.kind in (worker_log.POSTED, worker_log.REPLY_POSTED) and flight.is_question:
            return False  # a question is nothing to post
        if is_named and line.text != place:
            if flight.key in self._misnamed:
                self._others.append(self._misnamed[flight.key].at)
            self._misnamed[flight.key] = line
            return False
        return True

    def _give(self, line: Line, flight: Flight) -> None:
        at = min(max(line.at, flight.begun), time.time())
        self._misnamed = {key: other for key, other in self._misnamed.items() if other is not line}
        if line.kind == worker_log.FAILED:
            flight.failed = line.at
            self._failures += [] if flight.is_question else [flight.address]
        else:
            if flight.kind:
                self._others.append(at)  # it was another's line
            flight.kind, flight.text, flight.at = line.kind, line.text, at
        self._unsaved.append(flight)

    def _give_up_those_before(self) -> None:
        """Zulip has posted mail that it was given later."""
        told = max((place for place, flight in enumerate(self._flights) if flight.kind), default=0)
        for flight in self._flights[:told]:
            if not flight.kind:
                flight.kind, flight.at = LOST, time.time()
                self._unsaved.append(flight)

    def _decide(self) -> None:
        """What is told by something that does not come any more."""
        if self._overdue() and time.monotonic() - self._last_line > _QUIET:
            for flight in self._flights:
                if not flight.kind and flight.key in self._misnamed:  # the channel was renamed
                    self._give(self._misnamed.pop(flight.key), flight)
        for flight in self._flights:
            if flight.failed is None or flight.kind or time.time() < flight.failed + _SAYS_SO:
                continue
            if self._restarted(flight.failed):
                flight.failed = None
            else:
                flight.kind, flight.at = worker_log.FAILED, flight.failed
            self._unsaved.append(flight)

    def _restarted(self, failed: float) -> bool:
        return any(failed - 1 <= at <= failed + _SAYS_SO for at in self._restarts)

    def _overdue(self) -> bool:
        late = time.time() - PROMPT
        return any(not flight.kind and (flight.handed or late) < late for flight in self._flights)

    def _may_go(self, is_reply: bool) -> bool:
        """True if nothing under way has to be told first: of two to channels, or of any if one is overdue."""
        is_overdue = self._overdue()
        before = [
            flight.begun
            for flight in self._flights
            if (not flight.kind or self._may_be_anothers(flight))
            and flight.handed != IN_DOUBT
            and (is_overdue or not (is_reply or flight.is_reply))
        ]
        return not self._is_handing and max(before, default=0.0) < time.time() - _ONE_MORE

    def _too_long(self) -> Trouble:
        number = sum(not flight.kind for flight in self._flights)
        if not number or (number == 1 and self._is_handing):
            return Trouble("4.3.2", "busy", "Zulip is being given another mail, which takes long")
        return Trouble(
            "4.3.2",
            "worker",
            f"Zulip has accepted {number} mails and its email_mirror worker has not consumed them; "
            "look at: supervisorctl status; see docs/troubleshooting.md",
        )

    def _save(self, flight: Flight) -> None:
        with self._changed, suppress(Trouble), self._journal.change() as database:
            self._journal.save_flight(database, flight)

    def _told(self, flight: Flight, seconds: float, is_stopping: Callable[[], bool] = lambda: False) -> bool:
        """Wait for the line about a mail; False if none comes."""
        end = time.monotonic() + seconds
        with self._changed:
            while True:
                self.read_log()
                if flight.kind and not self._may_be_anothers(flight):
                    return True
                if time.monotonic() > end or is_stopping():
                    break
                self._changed.wait(_LOOK)
            return bool(flight.kind)

    def _may_be_anothers(self, flight: Flight) -> bool:
        recent = time.time() - (flight.at or 0) < _SECOND_THOUGHT
        return recent and flight.kind in _NAMELESS and self._place(flight) != ""

    def _place(self, flight: Flight) -> str:
        """The channel, as Zulip named it the last time; empty if that is not known."""
        with suppress(Trouble):
            return "" if flight.is_reply else self._journal.place(flight.address)
        return ""


def verdict_of(flight: Flight) -> Verdict:
    """The outcome of a mail as a verdict."""
    if flight.kind in (worker_log.POSTED, worker_log.REPLY_POSTED):
        return Delivered("posted in Zulip", POSTED)
    if flight.kind == worker_log.AUTOMATIC:
        return Delivered("an automatic reply, which Zulip does not post", DROPPED)
    if flight.kind in _REFUSED:
        status, cause, reason = _REFUSED[flight.kind]
        return Refused(status, cause, f"{reason}: {flight.text}" if flight.text else reason)
    return Deferred(*_TROUBLE[flight.kind], counted=flight.kind != worker_log.RATE_LIMITED)


def _position(found: list[object] | None) -> Position | None:
    return None if found is None else Position(str(found[0]), int(str(found[1])), int(str(found[2])))
