"""Sliding windows over what Zulip's worker has consumed.

Zulip drops, without a word, the mail that exceeds 50 in 60 s, 120 in 300 s or
600 in 3600 s (zerver/lib/rate_limiter.py). It counts when its worker consumes a
mail, not when it accepts it; a worker that was slow or stopped consumes all that
waits within one window. So every mail holds a slot in each window:

- from the hand-over on it counts as if it were consumed now,
- once the worker is known to have consumed it, as consumed at that moment.

A stamp of the worker proves it for what was handed over at least MARGIN earlier.
For what was handed over within MARGIN of the last stamp it does not: the worker
may have been stopped right then. After a burst nothing but such mail is left,
and no new stamp comes before another mail does. Therefore the last slot of each
window is kept for a probe: one mail, handed over when nothing else can be in
flight, whose stamp proves all that went before. Even if the worker was stopped,
it finds no more than the limit when it starts.

Zulip 11 and later count in their SMTP server, when the mail is handed over: there
the worker is not asked. Should that server say that its limit is used up, though
there is room here (others feed it too), the next try waits, longer each time.

A hand-over that got no answer may or may not have reached Zulip. It counts like
the others, but does not hold the probe up, and after the longest window it no
longer counts: else Zulip being silent for an hour would stop the gateway for good.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from . import worker
from .config import Config, Window
from .state import Data, State
from .verdict import RATE_LIMITED, Deferred, Delivered, Trouble, Verdict

# A mail handed over this long (seconds) before a stamp had reached the worker.
MARGIN = 1.0
# While the answer depends on the worker, look again after this time (seconds).
POLL = 0.25

# After Zulip's own "rate-limited" wait this long, and twice as long each time (seconds).
FIRST_HOLD, LONGEST_HOLD = 5.0, 60.0

# id; opened: when the slot was taken; handed: when Zulip accepted the mail, None
# until then; consumed: the latest moment at which the worker can have consumed
# it, None while that is not known; doubt: there was no answer. All in Unix
# seconds: Zulip's limiter goes by the same clock of the same host.
Slot = dict[str, Any]


def settle(
    slots: list[Slot], statistics: worker.Statistics | None, now: float, deadline: float, longest: float
) -> None:
    """Note in `slots` which mails are proved to be consumed.

    deadline: seconds after which a hand-over that never ended can not be under
    way any more (its process was killed). longest: seconds of the longest window.
    """
    for slot in slots:
        if slot["handed"] is None and (slot["opened"] > now or slot["opened"] + deadline < now):
            slot["handed"] = min(slot["opened"] + deadline, now)
            slot["doubt"] = True
        if any(slot[key] is not None and slot[key] > now for key in ("handed", "consumed")):
            # The clock was set back: no stamp can be compared with it any more.
            slot["handed"] = slot["consumed"] = now
        if slot["handed"] is None or slot["consumed"] is not None:
            continue
        if statistics is None or (slot["doubt"] and slot["handed"] + longest < now):
            slot["consumed"] = slot["handed"]
        elif statistics.settled(now) and slot["handed"] + MARGIN <= statistics.emptied:
            slot["consumed"] = statistics.emptied
        elif statistics.found_nothing(now) and slot["handed"] <= statistics.emptied:
            slot["consumed"] = now


def quiet(slots: Sequence[Slot], statistics: worker.Statistics | None, now: float) -> bool:
    """True if nothing can be in flight unless the worker was stopped, and the stamp
    of a mail handed over now would prove all that went before."""
    if any(slot["handed"] is None for slot in slots):
        return False
    unproved = [slot["handed"] for slot in slots if slot["consumed"] is None and not slot["doubt"]]
    if statistics is None or not unproved:
        return True
    # When a hand-over was noted says little: the worker's stamp may be older than the note
    # of the mail it is for. A worker that runs and has been idle for this long has them all.
    return statistics.settled(now) and max(unproved) <= now - MARGIN


def room(slots: Sequence[Slot], windows: Sequence[Window], is_quiet: bool, now: float) -> float:
    """Seconds until a mail may be handed over; 0 if it may be now.

    POLL stands for an unknown time: it depends on the worker.
    """
    longest = 0.0
    for limit, seconds in windows:
        expiring = sorted(slot["consumed"] + seconds for slot in slots if slot["consumed"] is not None)
        expiring = [moment for moment in expiring if moment > now]
        used = len(expiring) + sum(slot["consumed"] is None for slot in slots)
        if used < limit - 1 or (used == limit - 1 and is_quiet):
            continue
        must_expire = used - limit  # index of the slot whose end makes room
        known = 0 <= must_expire < len(expiring)
        longest = max(longest, expiring[must_expire] - now if known else POLL)
    return longest


def hold(data: Data, now: float) -> float:
    """Seconds for which Zulip's own "rate-limited" still holds mail back."""
    if "hold" not in data:
        return 0.0
    left: float = data["hold"]["until"] - now
    return left if left <= data["hold"]["seconds"] else 0.0  # else the clock was set back


def windows_of(config: Config, statistics: worker.Statistics | None) -> tuple[Window, ...]:
    """The windows to keep: this host's share, stretched when flying blind."""
    slack = config.slack if statistics is None and config.worker_counts else 0.0
    return tuple(Window(limit // config.hosts, seconds + slack) for limit, seconds in config.windows)


class Pace:
    """Takes and gives back slots in the shared state."""

    def __init__(
        self,
        config: Config,
        state: State,
        deadline: float,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._config = config
        self._state = state
        self._deadline = deadline
        self._clock = clock
        self._sleep = sleep
        # Seconds to wait for room before the mail is deferred.
        self.max_wait = config.max_wait

    def acquire(self) -> int:
        """Wait for room, take a slot and return its id.

        Raises Trouble when the wait would exceed max_wait or the state can not
        be written.
        """
        give_up = self._clock() + self.max_wait
        while True:
            with self._state.change() as data:
                now = self._clock()
                statistics = self.refresh(data, now)
                slots = data["slots"]
                wait = room(slots, windows_of(self._config, statistics), quiet(slots, statistics, now), now)
                wait = max(wait, hold(data, now))
                if wait <= 0:
                    number = 1 + max((slot["id"] for slot in slots), default=0)
                    slots.append({"id": number, "opened": now, "handed": None, "consumed": None, "doubt": False})
                    return number
                in_flight = sum(slot["consumed"] is None for slot in slots)
            if now + wait > give_up:
                raise self._too_long(wait, in_flight)
            self._sleep(min(wait, 1.0))

    def close(self, data: Data, number: int, verdict: Verdict) -> None:
        """Note in `data` what became of the hand-over that held this slot."""
        now = self._clock()
        in_doubt = isinstance(verdict, Deferred) and verdict.in_doubt
        if isinstance(verdict, Delivered) or in_doubt:
            for slot in data["slots"]:
                if slot["id"] == number:
                    slot.update(handed=now, doubt=in_doubt)
        else:
            # Zulip has surely not taken the mail.
            data["slots"] = [slot for slot in data["slots"] if slot["id"] != number]
        if isinstance(verdict, Delivered):
            data.pop("hold", None)
        elif verdict.cause == RATE_LIMITED:
            seconds = min(2 * data["hold"]["seconds"], LONGEST_HOLD) if "hold" in data else FIRST_HOLD
            data["hold"] = {"seconds": seconds, "until": now + seconds}

    def refresh(self, data: Data, now: float) -> worker.Statistics | None:
        """Bring the slots in `data` up to date; the worker's statistics."""
        statistics = worker.read(self._config.queue_stats, now) if self._config.worker_counts else None
        if "damaged" in data:
            self._assume_full(data)
        longest = max(seconds for _, seconds in self._config.windows) + self._config.slack
        settle(data["slots"], statistics, now, self._deadline, longest)
        data["slots"] = [slot for slot in data["slots"] if slot["consumed"] is None or slot["consumed"] + longest > now]
        return statistics

    def _assume_full(self, data: Data) -> None:
        when = data.pop("damaged")
        most = max(limit for limit, _ in self._config.windows)
        data["slots"] = [
            {"id": number, "opened": when, "handed": when, "consumed": when, "doubt": False}
            for number in range(1, most + 1)
        ]

    @staticmethod
    def _too_long(wait: float, in_flight: int) -> Trouble:
        if wait > POLL:
            reason = f"Zulip's rate limit is used up; the next mail may go in {wait:.0f} s"
            return Trouble("4.7.28", RATE_LIMITED, reason)
        return Trouble(
            "4.3.2",
            "worker",
            f"Zulip has accepted {in_flight} mails and its email_mirror worker has not consumed them; "
            "look at: supervisorctl status; see docs/troubleshooting.md",
        )


def usage(data: Data, windows: Sequence[Window], now: float) -> list[tuple[Window, int]]:
    """How many slots of each window are taken, for status."""
    return [
        (window, sum(slot["consumed"] is None or slot["consumed"] + window.seconds > now for slot in data["slots"]))
        for window in windows
    ]
