"""The sliding windows: against a slow obvious model, and with a modelled worker."""

from __future__ import annotations

import json
import multiprocessing
import random
from pathlib import Path

import pytest
from email_gateway import pace, worker
from email_gateway.config import Config, Window
from email_gateway.state import State
from email_gateway.verdict import Delivered, Trouble
from hypothesis import given, settings
from hypothesis import strategies as st
from test_config import make_config

NOW = 1_000_000.0


@pytest.fixture(scope="module", autouse=True)
def fast_disk():
    """These tests crash no machine: spare them the flushing of thousands of files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)
        yield


windows = st.lists(st.builds(Window, st.integers(1, 8), st.integers(1, 50)), min_size=1, max_size=3)
consumed = st.lists(st.floats(NOW - 60, NOW, allow_nan=False), max_size=20)


def close(gate: pace.Pace, number: int) -> None:
    with gate._state.change() as data:
        gate.close(data, number, Delivered())


def slot(consumed_at: float | None, handed: float | None = NOW, doubt: bool = False) -> pace.Slot:
    return {"id": 1, "opened": NOW - 100, "handed": handed, "consumed": consumed_at, "doubt": doubt}


@given(windows, consumed)
def test_room_agrees_with_trying_every_moment(limits, moments):
    """The model: count what lies in each window, at every moment at which one leaves."""

    def allowed(at: float) -> bool:
        return all(sum(moment + seconds > at for moment in moments) < limit for limit, seconds in limits)

    moments_of_change = [NOW, *(moment + seconds for moment in moments for _, seconds in limits)]
    first = min(at for at in moments_of_change if at >= NOW and allowed(at))
    assert NOW + pace.room([slot(moment) for moment in moments], limits, True, NOW) == pytest.approx(first)


@given(windows, consumed)
def test_the_last_slot_of_a_window_is_for_a_probe(limits, moments):
    slots = [slot(moment) for moment in moments]
    if pace.room(slots, limits, False, NOW) == 0:
        probed = [*slots, slot(None)]
        assert pace.room(probed, [Window(limit + 1, seconds) for limit, seconds in limits], True, NOW) == 0


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

    gate = pace.Pace(config, State(folder), 30, clock=lambda: clock[0], sleep=sleep)
    for _ in range(30):
        number = gate.acquire()
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
    slots = [slot(None, handed=NOW - 30)]
    pace.settle(slots, worker.read(config.queue_stats, NOW + 5), NOW + 5, 60, 3600)
    assert slots[0]["consumed"] is None


@pytest.mark.parametrize("late", [0.0, 0.3])
def test_a_probe_goes_though_the_last_note_is_younger_than_the_stamp(tmp_path, late):
    """The worker was faster than the note of the hand-over: else no mail ever went again."""
    config = make_config(tmp_path, windows=(Window(10, 60),))
    slots = [slot(None, handed=NOW + late - number / 10) for number in range(9)]
    statistics = worker.Statistics(NOW, idle=True, started=False)
    for now, seconds in ((NOW + 0.6, pace.POLL), (NOW + 2, 0)):
        pace.settle(slots, statistics, now, 60, 60)
        assert pace.room(slots, config.windows, pace.quiet(slots, statistics, now), now) == seconds


def test_a_worker_that_starts_and_finds_nothing_has_consumed_all_before():
    """Killed right after its last stamp: no stamp would ever prove the rest, nor any mail go."""
    started = worker.Statistics(NOW - 20, idle=True, started=True)
    slots = [slot(None, handed=NOW - 21), slot(None, handed=NOW - 19)]
    pace.settle(slots, started, NOW - 10, 60, 3600)
    assert [one["consumed"] for one in slots] == [None, None]
    pace.settle(slots, started, NOW, 60, 3600)
    assert [one["consumed"] for one in slots] == [NOW, None]


def test_without_statistics_the_windows_are_stretched(tmp_path):
    config = make_config(tmp_path, windows=(Window(2, 60),), slack=30)
    assert pace.windows_of(config, None) == (Window(2, 90),)


def test_an_unanswered_hand_over_stops_counting_after_the_longest_window():
    idle = worker.Statistics(NOW - 5000, idle=True, started=False)
    slots = [slot(None, handed=NOW - 3601, doubt=True), slot(None, handed=NOW - 3601)]
    pace.settle(slots, idle, NOW, 60, 3600)
    assert [one["consumed"] is None for one in slots] == [False, True]


def test_a_clock_set_back_does_not_stop_the_gateway():
    slots = [slot(None, handed=NOW + 5000)]
    pace.settle(slots, worker.Statistics(NOW - 10, idle=True, started=False), NOW, 60, 3600)
    assert slots[0]["consumed"] == NOW


def test_a_long_wait_is_deferred_with_the_time(tmp_path):
    config = make_config(tmp_path, windows=(Window(1, 600),), max_wait=1)
    gate = pace.Pace(config, State(tmp_path), 30, clock=lambda: NOW, sleep=lambda _: None)
    close(gate, gate.acquire())
    with pytest.raises(Trouble, match="may go in 630 s"):
        gate.acquire()


def test_damaged_state_counts_as_used_up(tmp_path):
    (tmp_path / "state.json").write_text("{half")
    config = make_config(tmp_path, windows=(Window(5, 60), Window(9, 3600)), max_wait=1)
    with pytest.raises(Trouble, match="rate limit is used up"):
        pace.Pace(config, State(tmp_path), 30).acquire()


def _worker_process(config: Config, count: int, taken: multiprocessing.Queue[float]) -> None:
    gate = pace.Pace(config, State(config.state_dir), 30)
    for _ in range(count):
        number = gate.acquire()
        taken.put(gate._clock())
        close(gate, number)


def test_many_processes_share_the_windows(tmp_path):
    config = make_config(tmp_path, windows=(Window(8, 1.0),), slack=0.001, max_wait=60)
    queue: multiprocessing.Queue[float] = multiprocessing.Queue()
    processes = [multiprocessing.Process(target=_worker_process, args=(config, 4, queue)) for _ in range(6)]
    for process in processes:
        process.start()
    moments = sorted(queue.get(timeout=60) for _ in range(24))
    for process in processes:
        process.join()
    # A stamp is taken just before the hand-over; eight of them in a second, never nine.
    assert all(later - earlier > 0.99 for earlier, later in zip(moments, moments[8:], strict=False))
