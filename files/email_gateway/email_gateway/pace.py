"""Sliding windows over what Zulip's worker has consumed.

Zulip drops, without a word, the mail that exceeds 50 in 60 s, 120 in 300 s or
600 in 3600 s (zerver/lib/rate_limiter.py). It counts when its worker consumes a
mail, not when it accepts it; a worker that was slow or stopped consumes all that
waits within one window. So every mail holds a unit of each window:

- from the hand-over on it counts as if it were consumed now,
- once the worker is known to have consumed it, as consumed at that moment.

A stamp of the worker proves it for what was handed over at least MARGIN earlier.
For what was handed over within MARGIN of the last stamp it does not: the worker
may have been stopped right then. After a burst nothing but such mail is left,
and no new stamp comes before another mail does. Therefore the last unit of each
window is kept for a probe: one mail, handed over when nothing else can be in
flight, whose stamp proves all that went before. Even if the worker was stopped,
it finds no more than the limit when it starts.

Zulip 11 and later count in their SMTP server, when the mail is handed over: there
the worker is not asked. Should that server say that its limit is used up, though
there is room here (others feed it too), the next try waits, longer each time.

A hand-over that got no answer may or may not have reached Zulip, which may take it up
much later. It counts like the others, and no other mail goes for a while, longer each
time: else a silent Zulip would use up the windows. Once Zulip answers again, all of them
count as handed over only then.

A journal that is new or was damaged knows nothing of the last hour, which is then read
from the worker's log (worker_log.py). Until that works the windows count as full. What a
lost journal may have handed over, and still waits in RabbitMQ, is feared until one mail's
stamp proves that nothing does.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from . import worker_log, worker_statistics
from .config import Config, Window
from .journal import Journal, Ticket, Unit
from .verdict import NO_ANSWER, RATE_LIMITED, STOPPING, Deferred, Delivered, Trouble, Verdict

# A mail handed over this long (seconds) before a stamp had reached the worker.
MARGIN = 1.0
# While the answer depends on the worker, look again after this time (seconds).
POLL = 0.25

# After Zulip's own "rate-limited", or no answer, wait this long, and twice as long each time (seconds).
FIRST_HOLD, LONGEST_HOLD = 5.0, 60.0

# {"cause": one of verdict.py, "seconds": how long, "until": Unix seconds}
Hold = dict[str, Any]


def settle(units: Sequence[Unit], statistics: worker_statistics.Statistics | None, now: float) -> None:
    """Note in `units` which mails are proved to be consumed."""
    for unit in units:
        if any(moment is not None and moment > now for moment in (unit.opened, unit.handed, unit.consumed)):
            # The clock was set back: no stamp can be compared with it any more.
            unit.opened = now
            if unit.handed is not None:
                unit.handed = unit.consumed = now
        if unit.handed is None or unit.consumed is not None:
            continue
        if statistics is None:
            unit.consumed = unit.handed
        elif statistics.settled(now) and unit.handed + MARGIN <= statistics.emptied:
            unit.consumed = statistics.emptied
        elif statistics.found_nothing(now) and unit.handed <= statistics.emptied:
            unit.consumed = now


def is_quiet(units: Sequence[Unit], statistics: worker_statistics.Statistics | None, now: float) -> bool:
    """True if nothing can be in flight unless the worker was stopped, and the stamp
    of a mail handed over now would prove all that went before."""
    if any(unit.handed is None for unit in units):
        return False
    unproved = [unit.handed for unit in units if unit.handed is not None and unit.consumed is None and not unit.doubt]
    if statistics is None or not unproved:
        return True
    # When a hand-over was noted says little: the worker's stamp may be older than the note
    # of the mail it is for. A worker that runs and has been idle for this long has them all.
    return statistics.settled(now) and max(unproved) <= now - MARGIN


def seconds_to_wait(units: Sequence[Unit], windows: Sequence[Window], quiet: bool, now: float) -> float:
    """Seconds until a mail may be handed over; 0 if it may be now.

    POLL stands for an unknown time: it depends on the worker.
    """
    longest = 0.0
    for limit, seconds in windows:
        expiring = sorted(unit.consumed + seconds for unit in units if unit.consumed is not None)
        expiring = [moment for moment in expiring if moment > now]
        used = len(expiring) + sum(unit.consumed is None for unit in units)
        if used < limit - 1 or (used == limit - 1 and quiet):
            continue
        must_expire = used - limit  # index of the unit whose end makes room
        known = 0 <= must_expire < len(expiring)
        longest = max(longest, expiring[must_expire] - now if known else POLL)
    return longest


def seconds_on_hold(hold: Hold | None, now: float) -> float:
    """Seconds for which what Zulip said last, or did not say, still holds mail back."""
    if hold is None:
        return 0.0
    left: float = hold["until"] - now
    return left if 0 < left <= hold["seconds"] else 0.0  # more: the clock was set back


def windows_of(config: Config, statistics: worker_statistics.Statistics | None) -> tuple[Window, ...]:
    """The windows to keep: this host's share, stretched when flying blind."""
    slack = config.slack if statistics is None and config.worker_counts else 0.0
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
        self._longest = max(seconds for _, seconds in config.windows) + config.slack

    def acquire(self, max_wait: float, is_stopping: Callable[[], bool] = lambda: False) -> Ticket:
        """Wait for room, and take a unit.

        max_wait: seconds. Raises Trouble when the wait would exceed them, when the journal
        cannot be written, or when `is_stopping` says that the service is to end.
        """
        give_up = self._clock() + max_wait
        while True:
            with self._journal.change() as database:
                now = self._clock()
                units, statistics = self._refresh(database, now)
                hold = self._journal.note("hold")
                quiet = is_quiet(units, statistics, now)
                wait = seconds_to_wait(units, windows_of(self._config, statistics), quiet, now)
                on_hold = seconds_on_hold(hold, now)
                if max(wait, on_hold) <= 0:
                    return self._journal.open_unit(database, now)
            if is_stopping():
                raise Trouble("4.3.2", STOPPING, "the gateway is being stopped or restarted")
            if now + max(wait, on_hold) > give_up:
                raise self._too_long(wait, on_hold, hold, units)
            self._sleep(min(max(wait, on_hold), 1.0))

    def close(self, database: sqlite3.Connection, ticket: Ticket | None, verdict: Verdict) -> None:
        """Note what became of the hand-over that held this unit (None: a reply, without one)."""
        now = self._clock()
        in_doubt = isinstance(verdict, Deferred) and verdict.in_doubt
        counted = in_doubt or isinstance(verdict, Delivered) or (isinstance(verdict, Deferred) and verdict.counted)
        if ticket is not None and counted:
            if not self._journal.has_issued(ticket):  # it was lost meanwhile, and the unit with it
                ticket = self._journal.open_unit(database, now)
            self._journal.save_units(database, [Unit(ticket.unit, now, now, None, in_doubt)])
        elif ticket is not None and self._journal.has_issued(ticket):
            self._journal.remove_unit(database, ticket.unit)
        hold: Hold | None = self._journal.note("hold")
        if isinstance(verdict, Deferred):
            cause = NO_ANSWER if in_doubt else verdict.cause
            if ticket is not None and cause in (NO_ANSWER, RATE_LIMITED):
                seconds = min(2 * hold["seconds"], LONGEST_HOLD) if hold else FIRST_HOLD
                self._journal.write_note(database, "hold", {"cause": cause, "seconds": seconds, "until": now + seconds})
            if in_doubt:
                self._bound_doubts(database)
        elif hold is not None and hold["cause"] == NO_ANSWER:
            # Zulip answers again, and may take up only now what it was given meanwhile.
            doubtful = self._doubtful()
            for unit in doubtful:
                unit.handed, unit.doubt = now, False
            self._journal.save_units(database, doubtful)
            self._journal.write_note(database, "hold", None)
        elif hold is not None and ticket is not None and isinstance(verdict, Delivered):
            self._journal.write_note(database, "hold", None)

    def _doubtful(self) -> list[Unit]:
        return [unit for unit in self._journal.units(self._clock()) if unit.doubt and unit.consumed is None]

    def _bound_doubts(self, database: sqlite3.Connection) -> None:
        """However long Zulip is silent, half of the smallest window stays free to try again."""
        most = min(limit for limit, _ in windows_of(self._config, None)) // 2
        oldest = self._doubtful()[:-most]
        for unit in oldest:
            unit.consumed = unit.handed
        self._journal.save_units(database, oldest)

    def nothing_in_flight(self) -> None:
        """After a start: what the service was handing over when it was killed is in doubt."""
        with self._journal.change() as database:
            killed = [unit for unit in self._journal.units(self._clock()) if unit.handed is None]
            for unit in killed:
                unit.handed, unit.doubt = self._clock(), True
            self._journal.save_units(database, killed)

    def look(self) -> tuple[list[Unit], worker_statistics.Statistics | None]:
        """Units and the worker's statistics as they are now; writes nothing."""
        now = self._clock()
        statistics = self._statistics(now)
        units = self._journal.units(now - self._longest)
        settle(units, statistics, now)
        return units, statistics

    def tidy(self) -> None:
        """Forget what no window reaches any more."""
        self._journal.forget_units(self._clock() - self._longest)

    def _refresh(
        self, database: sqlite3.Connection, now: float
    ) -> tuple[list[Unit], worker_statistics.Statistics | None]:
        """Units and statistics as they are now, also in the journal."""
        if self._journal.note("consumption unknown"):
            self._learn(database, now)
        statistics = self._statistics(now)
        self._no_longer_feared(database, statistics, now)
        units = self._journal.units(now - self._longest)
        before = [replace(unit) for unit in units]
        settle(units, statistics, now)
        changed = [unit for unit, then in zip(units, before, strict=True) if unit != then]
        self._journal.save_units(database, changed)
        return units + self._feared(statistics), statistics

    def _learn(self, database: sqlite3.Connection, now: float) -> None:
        """What Zulip has counted before this journal was made: from its log, else all there is."""
        times: list[float] | None = []
        if self._config.worker_counts:  # else its mail server says what it has counted
            times = worker_log.consumed_since(self._config.logs, now - self._longest)
        if times is None:
            times = [now] * max(limit for limit, _ in self._config.windows)
        self._journal.add_consumed(database, times)
        self._journal.write_note(database, "consumption unknown", None)
        statistics = self._statistics(now)
        if self._journal.note("lost") and statistics is not None:
            self._journal.write_note(database, "feared", statistics.emptied if statistics.started else now)

    def _feared(self, statistics: worker_statistics.Statistics | None) -> list[Unit]:
        """What a lost journal may have handed over, and still waits in RabbitMQ: as much as leaves
        room for one mail, whose stamp proves that nothing does."""
        since = self._journal.note("feared")
        if since is None:
            return []
        smallest = min(limit for limit, _ in windows_of(self._config, statistics))
        return [Unit(0, since, since) for _ in range(smallest - 1)]

    def _no_longer_feared(
        self, database: sqlite3.Connection, statistics: worker_statistics.Statistics | None, now: float
    ) -> None:
        """Once the worker is known to have had it all, its log tells how much that was."""
        feared = self._feared(statistics)
        settle(feared, statistics, now)
        if not feared or feared[0].consumed is None:
            return
        since = feared[0].opened
        times = worker_log.consumed_since(self._config.logs, since)
        ours = sum(unit.opened >= since for unit in self._journal.units(0))
        others = [unit.consumed for unit in feared] if times is None else times[: max(0, len(times) - ours)]
        self._journal.add_consumed(database, [at for at in others if at is not None])
        self._journal.write_note(database, "feared", None)

    def _statistics(self, now: float) -> worker_statistics.Statistics | None:
        return worker_statistics.read(self._config.queue_stats, now) if self._config.worker_counts else None

    def _too_long(self, wait: float, on_hold: float, hold: Hold | None, units: Sequence[Unit]) -> Trouble:
        if hold is not None and on_hold > wait and hold["cause"] == NO_ANSWER:
            reason = "Zulip did not answer when it was given the last mail"
            return Trouble("4.3.2", NO_ANSWER, f"{reason}; the next try is in {on_hold:.0f} s")
        if max(wait, on_hold) > POLL:
            reason = f"Zulip's rate limit is used up; the next mail may go in {max(wait, on_hold):.0f} s"
            return Trouble("4.7.28", RATE_LIMITED, reason)
        return Trouble(
            "4.3.2",
            "worker",
            f"Zulip has accepted {sum(unit.consumed is None for unit in units)} mails and its email_mirror worker has "
            "not consumed them; look at: supervisorctl status; see docs/troubleshooting.md",
        )


def usage(units: Sequence[Unit], windows: Sequence[Window], now: float) -> list[tuple[Window, int]]:
    """How many units of each window are taken, for status."""
    return [
        (window, sum(unit.consumed is None or unit.consumed + window.seconds > now for unit in units))
        for window in windows
    ]
