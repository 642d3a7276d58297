"""The sliding windows: against a slow obvious model, and with a modelled worker."""

from __future__ import annotations

import json
import random
import threading
import time
from pathlib import Path

import pytest
from email_gateway import pace, worker_statistics
from email_gateway.config import Config, Window
from email_gateway.journal import Journal, Ticket, Unit
from email_gateway.verdict import NO_ANSWER, Deferred, Delivered, Trouble, Verdict
from hypothesis import given, settings
from hypothesis import strategies as st
from test_config import make_config

NOW = 1_000_000.0
ACCEPTED = Delivered()


def by_clock(config: Config, clock: list[float], knows: bool = False) -> pace.Pace:
    """A pacing by a clock that goes on only while it sleeps. knows: that nothing was consumed in the last hour."""

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    journal = Journal(config.state_dir)
    if knows:
        with journal.change() as database:
            journal.write_note(database, "consumption unknown", None)
    return pace.Pace(config, journal, lambda: clock[0], sleep)


windows = st.lists(st.builds(Window, st.integers(1, 8), st.integers(1, 50)), min_size=1, max_size=3)
consumed = st.lists(st.floats(NOW - 60, NOW, allow_nan=False), max_size=20)


def close(gate: pace.Pace, number: Ticket, verdict: Verdict = ACCEPTED) -> None:
    with gate._journal.change() as database:
        gate.close(database, number, verdict)


def unit(consumed_at: float | None, handed: float | None = NOW, doubt: bool = False) -> Unit:
    return Unit(1, NOW - 100, handed, consumed_at, doubt)


@given(windows, consumed)
def test_room_agrees_with_trying_every_moment(limits, moments):
    """The model: count what lies in each window, at every moment at which one leaves."""

    def allowed(at: float) -> bool:
        return all(sum(moment + seconds > at for moment in moments) < limit for limit, seconds in limits)

    moments_of_change = [NOW, *(moment + seconds for moment in moments for _, seconds in limits)]
    first = min(at for at in moments_of_change if at >= NOW and allowed(at))
    assert NOW + pace.seconds_to_wait([unit(moment) for moment in moments], limits, True, NOW) == pytest.approx(first)


@given(windows, consumed)
def test_the_last_unit_of_a_window_is_for_a_probe(limits, moments):
    units = [unit(moment) for moment in moments]
    if pace.seconds_to_wait(units, limits, False, NOW) == 0:
        probed = [*units, unit(None)]
        assert pace.seconds_to_wait(probed, [Window(limit + 1, seconds) for limit, seconds in limits], True, NOW) == 0


class Zulip:
    """A worker with Zulip's own way of writing its statistics, and Zulip's limiter."""

    def __init__(self, file: Path, limits: list[Window], consume: float) -> None:
        self.file, self.limits, self.consume = file, limits, consume
        self.queue: list[float] = []
        self.accepted: list[float] = []
        self.dropped = 0
        self.free_at = 0.0
        self.stopped_until = 0.0
        self.times = self.starts = 0

    def write(self, updated: float, emptied: float) -> None:
        self.emptied = emptied
        self.file.write_text(
            json.dumps(
                {
                    "update_time": updated,
                    "queue_last_emptied_timestamp": emptied,
                    "recent_average_consume_time": self.consume if self.times else None,
                }
            )
        )

    def start(self, now: float) -> None:
        self.starts += 1
        self.times = 0
        self.free_at = now
        self.write(now, now)

    def run_until(self, now: float) -> None:
        """Consume what has arrived, one at a time, with a stamp where it looks empty."""
        while self.queue and self.stopped_until <= now:
            begin = max(self.free_at, self.queue[0], self.stopped_until)
            if self.emptied == self.free_at:
                self.write(begin, self.emptied)
            done = begin + self.consume
            if done > now:
                return
            self.queue.pop(0)
            self.free_at = done
            self.times += 1
            if all(sum(at > done - seconds for at in self.accepted) < limit for limit, seconds in self.limits):
                self.accepted.append(done)
            else:
                self.dropped += 1
            if not any(arrived < begin for arrived in self.queue):
                self.write(done, done)


@settings(deadline=None, max_examples=25)
@given(st.randoms(use_true_random=False), st.floats(0.025, 0.3), st.booleans())
def test_zulip_never_drops_whatever_its_worker_does(tmp_path_factory, rng: random.Random, consume, restarts):
    """A flood against a worker that is slow, stopped and restarted: nothing is dropped."""
    folder = tmp_path_factory.mktemp("pace")
    limits = [Window(6, 4.0), Window(14, 20.0)]
    config = make_config(folder, windows=tuple(limits), max_wait=10_000)
    zulip = Zulip(config.queue_stats, limits, consume)
    clock = [NOW]
    zulip.start(NOW)

    def sleep(seconds: float) -> None:
        end = clock[0] + seconds
        while clock[0] < end:
            clock[0] = min(end, clock[0] + 0.05)
            # A worker that is restarted for ever would never consume anything.
            if zulip.starts < (50 if restarts else 0) and rng.random() < 0.01 and zulip.stopped_until < clock[0]:
                zulip.run_until(clock[0])
                zulip.stopped_until = clock[0] + rng.choice([0.5, 3, 12])
            if zulip.stopped_until and zulip.stopped_until <= clock[0]:
                zulip.stopped_until = 0.0
                zulip.start(clock[0])
            zulip.run_until(clock[0])

    gate = pace.Pace(config, Journal(folder), clock=lambda: clock[0], sleep=sleep)
    for _ in range(30):
        number = gate.acquire(config.max_wait)
        sleep(0.02)
        zulip.queue.append(clock[0])
        close(gate, number)
    sleep(60)
    assert (len(zulip.accepted), zulip.dropped) == (30, 0)


def test_a_start_of_the_worker_proves_nothing(tmp_path):
    config = make_config(tmp_path)
    config.queue_stats.write_text(
        json.dumps({"update_time": NOW, "queue_last_emptied_timestamp": NOW, "recent_average_consume_time": None})
    )
    units = [unit(None, handed=NOW - 30)]
    pace.settle(units, worker_statistics.read(config.queue_stats, NOW + 5), NOW + 5)
    assert units[0].consumed is None


@pytest.mark.parametrize("late", [0.0, 0.3])
def test_a_probe_goes_though_the_last_note_is_younger_than_the_stamp(tmp_path, late):
    """The worker was faster than the note of the hand-over: else no mail ever went again."""
    config = make_config(tmp_path, windows=(Window(10, 60),))
    units = [unit(None, handed=NOW + late - number / 10) for number in range(9)]
    statistics = worker_statistics.Statistics(NOW, idle=True, started=False)
    for now, seconds in ((NOW + 0.6, pace.POLL), (NOW + 2, 0)):
        pace.settle(units, statistics, now)
        assert pace.seconds_to_wait(units, config.windows, pace.is_quiet(units, statistics, now), now) == seconds


def test_a_worker_that_starts_and_finds_nothing_has_consumed_all_before():
    """Killed right after its last stamp: no stamp would ever prove the rest, nor any mail go."""
    started = worker_statistics.Statistics(NOW - 20, idle=True, started=True)
    units = [unit(None, handed=NOW - 21), unit(None, handed=NOW - 19)]
    pace.settle(units, started, NOW - 10)
    assert [one.consumed for one in units] == [None, None]
    pace.settle(units, started, NOW)
    assert [one.consumed for one in units] == [NOW, None]


def test_without_statistics_the_windows_are_stretched(tmp_path):
    config = make_config(tmp_path, windows=(Window(2, 60),), slack=30)
    assert pace.windows_of(config, None) == (Window(2, 90),)


def idle(file: Path, since: float) -> None:
    """As a worker leaves it that has consumed all there was."""
    file.write_text(
        json.dumps({"update_time": since, "queue_last_emptied_timestamp": since, "recent_average_consume_time": 1})
    )


def test_a_silent_zulip_does_not_use_up_the_windows(tmp_path):
    """It hangs for 25 minutes: the next try waits longer each time, and when it answers again mail goes on."""
    config = make_config(tmp_path, max_wait=100)
    idle(config.queue_stats, NOW - 5000)
    clock = [NOW]
    gate = by_clock(config, clock, knows=True)
    tries = 0
    while clock[0] < NOW + 1500:
        number = gate.acquire(config.max_wait)
        clock[0] += 30
        close(gate, number, Deferred("4.4.2", NO_ANSWER, "silent", in_doubt=True))
        tries += 1
    assert tries < 25
    with pytest.raises(Trouble, match="Zulip did not answer when it was given the last mail; the next try is in 60 s"):
        gate.acquire(1)
    close(gate, gate.acquire(config.max_wait))
    # All that it was given counts from now on: it may take it up only now.
    units, _ = gate.look()
    assert {one.handed for one in units} == {clock[0]} and not any(one.doubt for one in units)
    began = clock[0]
    for _ in range(10):
        close(gate, gate.acquire(config.max_wait))
    assert clock[0] == began


def test_however_long_zulip_is_silent_it_is_tried_again(tmp_path):
    config = make_config(tmp_path, windows=(Window(4, 60), Window(10, 3600)), max_wait=1000)
    idle(config.queue_stats, NOW)
    clock = [NOW]
    gate = by_clock(config, clock, knows=True)
    for _ in range(30):
        close(gate, gate.acquire(1e6), Deferred("4.4.2", NO_ANSWER, "silent", in_doubt=True))


def test_a_clock_set_back_does_not_stop_the_gateway():
    units = [unit(None, handed=NOW + 5000)]
    pace.settle(units, worker_statistics.Statistics(NOW - 10, idle=True, started=False), NOW)
    assert units[0].consumed == NOW


def test_a_clock_that_was_a_year_ahead(tmp_path):
    """It stops nothing for a year; what was counted then counts as counted now."""
    config = make_config(tmp_path, windows=(Window(3, 60),), slack=1)
    clock = [NOW + 3e7]
    gate = by_clock(config, clock, knows=True)
    for _ in range(3):
        close(gate, gate.acquire(1))
    clock[0] = NOW
    close(gate, gate.acquire(100))
    assert clock[0] - NOW < 65


@pytest.mark.parametrize("waited", [0, 30])
def test_a_lost_journal_fears_what_may_wait_in_rabbitmq(tmp_path, waited):
    """The worker is stopped, and was given mails of which nobody knows: one more may go."""
    config = make_config(tmp_path, windows=(Window(50, 60),))
    (tmp_path / "failures-position.json").touch()
    idle(config.queue_stats, NOW - 100)
    clock = [NOW]
    gate = by_clock(config, clock)
    close(gate, gate.acquire(5))
    with pytest.raises(Trouble, match="worker has not consumed them"):
        gate.acquire(5)
    # It starts, and consumes what it had been given and the one mail. Its stamp proves them all.
    (config.logs / "workers.log").write_text(line(clock[0] + 1, POSTED) * (waited + 1))
    idle(config.queue_stats, clock[0] + 2)
    clock[0] += 3
    for _ in range(49 - waited):
        idle(config.queue_stats, clock[0])
        close(gate, gate.acquire(1))
        clock[0] += 1.6  # its stamps prove each mail, too
    if waited:
        with pytest.raises(Trouble, match="rate limit is used up"):
            gate.acquire(1)


def test_a_long_wait_is_deferred_with_the_time(tmp_path):
    config = make_config(tmp_path, windows=(Window(1, 600),), max_wait=1)
    gate = pace.Pace(config, Journal(tmp_path), clock=lambda: NOW, sleep=lambda _: None)
    close(gate, gate.acquire(config.max_wait))
    with pytest.raises(Trouble, match="may go in 630 s"):
        gate.acquire(config.max_wait)


def line(at: float, text: str, logger: str = "zerver.lib.email_mirror") -> str:
    stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(at)) + f".{int(at * 1000) % 1000:03}"
    return f"{stamp} INFO [{logger}] {text}\n"


POSTED = "Successfully processed email to general (zulip)"


def test_a_new_journal_learns_the_last_hour_from_the_workers_log(tmp_path):
    config = make_config(tmp_path, windows=(Window(3, 60), Window(5, 3600)), max_wait=1)
    log = config.logs / "workers.log"
    log.with_suffix(".log.1").write_text(line(NOW - 4000, POSTED) + line(NOW - 3000, POSTED) + "a traceback\n")
    log.write_text(
        line(NOW - 2000, POSTED)
        + line(NOW - 1999, "Successfully processed email from user 9 to general")
        + line(NOW - 1998, "Successfully processed email to general (zulip)", "zerver.other")
        + line(NOW - 1997, "MirrorWorker: Rejecting an email from: x - rate limited.", "zerver.worker.email_mirror")
        + line(NOW - 1000, "Email has no nonempty body sections; ignoring.")
    )
    gate = pace.Pace(config, Journal(tmp_path), clock=lambda: NOW, sleep=lambda _: None)
    close(gate, gate.acquire(1))
    units, _ = gate.look()
    assert [round(NOW - one.opened) for one in units] == [3000, 2000, 1000, 0]
    close(gate, gate.acquire(1))
    with pytest.raises(Trouble, match="rate limit is used up"):  # 3 of then and 2 of now
        gate.acquire(1)


@pytest.mark.parametrize("spoil", ["missing", "too little"])
def test_what_cannot_be_known_counts_as_used_up(tmp_path, monkeypatch, spoil):
    config = make_config(tmp_path, windows=(Window(5, 60), Window(9, 3600)))
    log = config.logs / "workers.log"
    if spoil == "missing":
        log.unlink()
    else:
        log.write_text(line(NOW - 50, POSTED))
        log.with_suffix(".log.1").write_text(line(NOW - 60, POSTED))
        monkeypatch.setattr("email_gateway.worker_log._MOST", 1)
    with pytest.raises(Trouble, match="rate limit is used up"):
        pace.Pace(config, Journal(tmp_path), clock=lambda: NOW, sleep=lambda _: None).acquire(1)


def test_zulips_mail_server_needs_no_log(tmp_path):
    config = make_config(tmp_path, url="smtp://127.0.0.1:10525", logs=tmp_path / "none")
    gate = pace.Pace(config, Journal(tmp_path), clock=lambda: NOW, sleep=lambda _: None)
    close(gate, gate.acquire(1))


def test_what_was_under_way_when_the_service_was_killed_is_in_doubt(tmp_path):
    config = make_config(tmp_path, windows=(Window(3, 600),))
    pace.Pace(config, Journal(tmp_path)).acquire(1)
    gate = pace.Pace(config, Journal(tmp_path))
    gate.nothing_in_flight()
    (one,) = Journal(tmp_path).units(0)
    assert one.doubt and one.handed is not None


def test_many_threads_share_the_windows(tmp_path):
    config = make_config(tmp_path, windows=(Window(8, 1.0),), slack=0.001)
    gate, moments = pace.Pace(config, Journal(tmp_path)), []

    def take() -> None:
        for _ in range(4):
            number = gate.acquire(60)
            moments.append(time.time())
            close(gate, number)

    threads = [threading.Thread(target=take) for _ in range(6)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    moments.sort()
    # Eight of them in a second, never nine; the moment is taken a little later than the unit.
    assert len(moments) == 24
    assert all(later - earlier > 0.9 for earlier, later in zip(moments, moments[8:], strict=False))
