"""Sliding windows over what Zulip's worker has consumed.

Zulip drops the mail that exceeds 50 in 60 s, 120 in 300 s or 600 in 3600 s
(zerver/lib/rate_limiter.py). It counts when its worker consumes a mail, not when it accepts
it; a worker that was slow or stopped consumes all that waits within one window. So every mail
holds a unit of each window until the worker's log says when it was consumed (outcome.py),
and from then on as consumed at that moment. What others have sent counts as well. Where the
log cannot be read a mail counts from the hand-over on, and the windows are stretched.

The places that are free are shared by the rule of dynamic thresholds (Choudhury and Hahne, IEEE/ACM
Transactions on Networking 6(2), 1998): a channel gets a place in a window while it has fewer
than `share` times as many as are free. One alone can take share / (share + 1) of a window, and
of 50 places some stay free for others as long as fewer than a dozen channels are flooded.

Zulip 11 and later count in their SMTP server, when the mail is handed over. Should Zulip
say that its limit is used up, though by our own account it is not, the next try waits, longer each time.

A hand-over that got no answer may or may not have reached Zulip, which may take it up
much later. It counts like the others, and no other mail goes for a while, longer each
time: else a silent Zulip would use up the windows. Once Zulip answers again, all of them
count as consumed only then.

A journal that is new or was damaged knows nothing of the last hour, which is then read
from the worker's log. Where that cannot be read the windows count as full.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from threading import Lock
from typing import Any

from . import worker_log
from .config import Config, Window
from .journal import Journal, Ticket, Unit
from .verdict import NO_ANSWER, RATE_LIMITED, STOPPING, Deferred, Delivered, Trouble, Verdict

# While the answer depends on mail that is under way, look again after this time (seconds).
POLL = 0.25

# After Zulip's own "rate-limited", or no answer, wait this long, and twice as long each time (seconds).
FIRST_BACKOFF, LONGEST_BACKOFF = 5.0, 60.0

# So many channels may wait for the rate limit at a time, each with its first mail, behind which the others
# wait in Postfix's queue; further ones go back into it at once. Whoever waits less than a moment
# (seconds) does not count. Each has a process of ours that waits.
_MOST_WAITING, _MOMENT = 8, 2.0

# {"cause": one of verdict.py, "seconds": how long, "until": Unix seconds}
Backoff = dict[str, Any]


def correct_clock(units: Sequence[Unit], now: float) -> None:
    """Correct in `units` what a clock that was set back has left in the future."""
    for unit in units:
        unit.opened = min(unit.opened, now)
        if unit.consumed is not None:
            unit.consumed = min(unit.consumed, now)


def seconds_to_wait(
    units: Sequence[Unit], windows: Sequence[Window], now: float, address: bytes, share: float
) -> float:
    """Seconds until a mail to this address may be handed over; 0 if it may be now.

    POLL stands for an unknown time: it depends on mail that is under way.
    """
    longest = 0.0
    for limit, seconds in windows:
        counting = [unit for unit in units if unit.consumed is None or unit.consumed + seconds > now]
        used, own = len(counting), sum(unit.address == address for unit in counting)
        wait = 0.0
        expiring = [(unit.consumed + seconds, unit.address) for unit in counting if unit.consumed is not None]
        expiring.sort(key=lambda one: one[0], reverse=True)
        while own >= share * (limit - used):
            if not expiring:
                wait = POLL
                break
            moment, whose = expiring.pop()
            wait, used, own = moment - now, used - 1, own - (whose == address)
        longest = max(longest, wait)
    return longest


def backoff_left(backoff: Backoff | None, now: float) -> float:
    """Seconds for which what Zulip said last, or did not say, still keeps mail waiting."""
    if backoff is None:
        return 0.0
    left: float = backoff["until"] - now
    return left if 0 < left <= backoff["seconds"] else 0.0  # more: the clock was set back


def windows_of(config: Config) -> tuple[Window, ...]:
    """The windows to keep: this host's share, stretched where nobody tells what Zulip has counted."""
    is_blind = config.worker_counts and worker_log.find(config.logs) is None
    slack = config.slack if is_blind else 0.0
    return tuple(Window(limit // config.hosts, seconds + slack) for limit, seconds in config.windows)


class Pace:
    """Takes and gives back units of Zulip's rate limit."""

    def __init__(
        self,
        config: Config,
        journal: Journal,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._config = config
        self._journal = journal
        self._clock = clock
        self._sleep = sleep
        self._waiting, self._lock = set[bytes](), Lock()
        self._longest = max(seconds for _, seconds in config.windows) + config.slack

    def acquire(self, address: bytes, max_wait: float, is_stopping: Callable[[], bool] = lambda: False) -> Ticket:
        """Wait for the rate limit, and take a unit for mail to this address.

        max_wait: seconds. Raises Trouble when the wait would exceed them, when too many wait, when
        the journal cannot be written, or when `is_stopping` says that the service is to end.
        """
        give_up = self._clock() + max_wait
        with ExitStack() as place:
            has_place = False
            while True:
                with self._journal.change() as database:
                    now = self._clock()
                    units = self._refresh(database, now)
                    backoff = self._journal.note("backoff")
                    wait = seconds_to_wait(units, windows_of(self._config), now, address, self._config.share)
                    backing_off = backoff_left(backoff, now)
                    if max(wait, backing_off) <= 0:
                        return self._journal.open_unit(database, now, address)
                if is_stopping():
                    raise Trouble("4.3.2", STOPPING, "the gateway is being stopped or restarted")
                if now + max(wait, backing_off) > give_up:
                    raise _too_long(wait, backing_off, backoff)
                if not has_place and max(wait, backing_off) > _MOMENT:
                    has_place = place.enter_context(self._place_to_wait(address))
                    if not has_place:
                        raise _too_long(wait, backing_off, backoff)
                self._sleep(min(max(wait, backing_off), 1.0))

    @contextmanager
    def _place_to_wait(self, address: bytes) -> Iterator[bool]:
        """False if all are taken, or one by the same channel."""
        with self._lock:
            is_free = address not in self._waiting and len(self._waiting) < _MOST_WAITING
            if is_free:
                self._waiting.add(address)
        try:
            yield is_free
        finally:
            if is_free:
                with self._lock:
                    self._waiting.discard(address)

    def close(self, database: sqlite3.Connection, ticket: Ticket | None, verdict: Verdict, is_logged: bool) -> None:
        """Note what became of the hand-over that held this unit (None: a reply, without one).

        is_logged: the worker's log tells when the unit was consumed, or will.
        """
        now = self._clock()
        in_doubt = isinstance(verdict, Deferred) and verdict.in_doubt
        counted = in_doubt or isinstance(verdict, Delivered) or (isinstance(verdict, Deferred) and verdict.counted)
        if ticket is not None and not is_logged and counted:
            if not self._journal.has_issued(ticket):  # it was lost meanwhile, and the unit with it
                ticket = self._journal.open_unit(database, now)
            self._journal.save_units(database, [Unit(ticket.unit, now, None if in_doubt else now, in_doubt)])
        elif ticket is not None and not is_logged and self._journal.has_issued(ticket):
            self._journal.remove_unit(database, ticket.unit)
        backoff: Backoff | None = self._journal.note("backoff")
        if isinstance(verdict, Deferred):
            cause = NO_ANSWER if in_doubt else verdict.cause
            if ticket is not None and cause in (NO_ANSWER, RATE_LIMITED):
                seconds = min(2 * backoff["seconds"], LONGEST_BACKOFF) if backoff else FIRST_BACKOFF
                self._journal.write_note(
                    database, "backoff", {"cause": cause, "seconds": seconds, "until": now + seconds}
                )
            if in_doubt:
                self._bound_doubts(database)
        elif backoff is not None and backoff["cause"] == NO_ANSWER:
            # Zulip answers again, and may take up only now what it was given meanwhile.
            doubtful = self._doubtful()
            for unit in doubtful:
                unit.consumed, unit.doubt = now, False
            self._journal.save_units(database, doubtful)
            self._journal.write_note(database, "backoff", None)
        elif backoff is not None and ticket is not None and isinstance(verdict, Delivered):
            self._journal.write_note(database, "backoff", None)

    def _doubtful(self) -> list[Unit]:
        return [unit for unit in self._journal.units(self._clock()) if unit.doubt and unit.consumed is None]

    def _bound_doubts(self, database: sqlite3.Connection) -> None:
        """However long Zulip is silent, half of the smallest window stays free to try again."""
        most = min(limit for limit, _ in windows_of(self._config)) // 2
        oldest = self._doubtful()[:-most]
        for unit in oldest:
            unit.consumed = unit.opened
        self._journal.save_units(database, oldest)

    def after_a_start(self) -> None:
        """What was being handed over when the service was killed may have been counted by now."""
        with self._journal.change() as database:
            told = {flight.unit.unit for flight in self._journal.flights() if flight.unit is not None}
            killed = [
                replace(unit, consumed=self._clock())
                for unit in self._journal.units(self._clock())
                if unit.consumed is None and not unit.doubt and unit.id not in told
            ]
            self._journal.save_units(database, killed)

    def units(self) -> list[Unit]:
        """The units as they are now; writes nothing."""
        now = self._clock()
        units = self._journal.units(now - self._longest)
        correct_clock(units, now)
        return units

    def tidy(self) -> None:
        """Forget what no window reaches any more."""
        self._journal.forget_units(self._clock() - self._longest)

    def _refresh(self, database: sqlite3.Connection, now: float) -> list[Unit]:
        """The units as they are now, also in the journal."""
        if self._journal.note("consumption unknown"):
            self._learn(database, now)
        units = self._journal.units(now - self._longest)
        before = [replace(unit) for unit in units]
        correct_clock(units, now)
        changed = [unit for unit, then in zip(units, before, strict=True) if unit != then]
        self._journal.save_units(database, changed)
        return units

    def _learn(self, database: sqlite3.Connection, now: float) -> None:
        """What Zulip has counted before this journal was made: from its log, else all there is."""
        times = worker_log.consumed_since(self._config.logs, now - self._longest)
        if times is None and not self._config.worker_counts:
            times = []  # Zulip's mail server says itself when its limit is used up
        if times is None:
            times = [now] * max(limit for limit, _ in self._config.windows)
        self._journal.add_consumed(database, times)
        self._journal.write_note(database, "consumption unknown", None)


def _too_long(wait: float, backing_off: float, backoff: Backoff | None) -> Trouble:
    if backoff is not None and backing_off > wait and backoff["cause"] == NO_ANSWER:
        reason = "Zulip did not answer when it was given the last mail"
        return Trouble("4.3.2", NO_ANSWER, f"{reason}; the next try is in {backing_off:.0f} s")
    reason = f"Zulip's rate limit is used up; the next mail may go in {max(wait, backing_off):.0f} s"
    return Trouble("4.7.28", RATE_LIMITED, reason)


def usage(units: Sequence[Unit], windows: Sequence[Window], now: float) -> list[tuple[Window, int]]:
    """How many units of each window are taken, for status."""
    return [
        (window, sum(unit.consumed is None or unit.consumed + window.seconds > now for unit in units))
        for window in windows
    ]
