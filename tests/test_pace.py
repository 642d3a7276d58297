"""The sliding windows: against a slow obvious model, and with a modelled Zulip."""

from __future__ import annotations

import threading

import pytest
import yaml
from email_gateway import pace
from email_gateway.config import Config, Window
from email_gateway.journal import Journal, Ticket, Unit
from email_gateway.verdict import NO_ANSWER, Deferred, Delivered, Trouble, Verdict
from hypothesis import given
from hypothesis import strategies as st
from mails import eventually, line
from test_config import ROLE, make_config

NOW = 1_000_000.0
OURS = b"ours"
ACCEPTED = Delivered()
POSTED = "Successfully processed email to general (zulip)"


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
        gate.close(database, number, verdict, is_logged=False)


def unit(consumed_at: float | None, address: bytes = OURS) -> Unit:
    return Unit(1, NOW - 100, consumed_at, address=address)


@given(windows, consumed, st.lists(st.booleans(), min_size=20, max_size=20), st.sampled_from([0.5, 1, 4, 1000]))
def test_room_agrees_with_trying_every_moment(limits, moments, ours, share):
    """The model: count what lies in each window, at every moment at which one leaves."""
    units = [unit(moment, OURS if own else b"other") for moment, own in zip(moments, ours, strict=False)]

    def allowed(at: float) -> bool:
        for limit, seconds in limits:
            counting = [one.address for one in units if one.consumed + seconds > at]
            if counting.count(OURS) >= share * (limit - len(counting)):
                return False
        return True

    moments_of_change = [NOW, *(moment + seconds for moment in moments for _, seconds in limits)]
    first = min(at for at in moments_of_change if at >= NOW and allowed(at))
    assert NOW + pace.seconds_to_wait(units, limits, NOW, OURS, share) == pytest.approx(first)


def test_what_is_under_way_holds_its_unit_until_it_is_consumed():
    limits = [Window(2, 60)]
    assert pace.seconds_to_wait([unit(None)], limits, NOW, OURS, 4) == 0
    assert pace.seconds_to_wait([unit(None), unit(None)], limits, NOW, OURS, 4) == pace.POLL
    assert pace.seconds_to_wait([unit(None), unit(NOW - 20)], limits, NOW, OURS, 4) == 40


@pytest.mark.parametrize(("flooded", "each"), [(1, 40), (2, 22), (3, 15), (8, 6)])
def test_flooded_channels_leave_room_for_others(flooded, each):
    """What each of them gets of a window of 50; the rest is free for a quiet one."""
    limits, units = [Window(50, 60)], list[Unit]()
    for _ in range(100):
        for number in range(flooded):
            if pace.seconds_to_wait(units, limits, NOW, b"%d" % number, 4) == 0:
                units.append(unit(NOW, b"%d" % number))
    assert all(sum(one.address == b"%d" % number for one in units) in (each, each + 1) for number in range(flooded))
    assert len(units) < 50 and pace.seconds_to_wait(units, limits, NOW, OURS, 4) == 0


def test_what_one_channel_can_post_in_an_hour_is_what_may_wait_for_it(tmp_path):
    """The default of email_gateway_most_queued."""
    config = make_config(tmp_path)
    units: list[Unit] = []
    while pace.seconds_to_wait(units, [config.windows[-1]], NOW, OURS, config.share) == 0:
        units.append(unit(NOW, OURS))
    defaults = yaml.safe_load((ROLE / "defaults/main.yml").read_text())
    assert len(units) == defaults["email_gateway_most_queued"] == config.most_queued
    assert defaults["email_gateway_rate_limit_share"] == config.share


def test_no_more_than_a_few_channels_wait_at_a_time(tmp_path, monkeypatch):
    """Each has a process of its own; so one that stands there twice, with another slug, goes as well."""
    monkeypatch.setattr(pace, "_MOST_WAITING", 2)
    config = make_config(tmp_path, windows=(Window(1, 4),), max_wait=60)
    clock, goes_on, told = [NOW], threading.Event(), list[str]()

    def sleep(seconds: float) -> None:
        assert goes_on.wait(20)
        clock[0] += seconds

    gate = pace.Pace(config, Journal(tmp_path), lambda: clock[0], sleep)
    close(gate, gate.acquire(b"first", 1))

    def take(address: bytes) -> None:
        try:
            close(gate, gate.acquire(address, 60))
            told.append("room")
        except Trouble as trouble:
            told.append(trouble.verdict.cause)

    threads = [threading.Thread(target=take, args=(address,)) for address in (b"1", b"1", b"2", b"3")]
    for one in threads:
        one.start()
    assert eventually(lambda: told == ["rate limit"] * 2)
    goes_on.set()
    for one in threads:
        one.join()
    assert told == ["rate limit", "rate limit", "room", "room"]


def test_without_the_workers_log_the_windows_are_stretched(tmp_path):
    config = make_config(tmp_path, windows=(Window(2, 60),), slack=30)
    assert pace.windows_of(config) == (Window(2, 60),)
    (config.logs / "workers.log").unlink()
    assert pace.windows_of(config) == (Window(2, 90),)


def test_a_silent_zulip_does_not_use_up_the_windows(tmp_path):
    """It hangs for 25 minutes: the next try waits longer each time, and when it answers again mail goes on."""
    config = make_config(tmp_path, max_wait=100)
    clock = [NOW]
    gate = by_clock(config, clock, knows=True)
    tries = 0
    while clock[0] < NOW + 1500:
        number = gate.acquire(OURS, config.max_wait)
        clock[0] += 30
        close(gate, number, Deferred("4.4.2", NO_ANSWER, "silent", in_doubt=True))
        tries += 1
    assert tries < 25
    with pytest.raises(Trouble, match="Zulip did not answer when it was given the last mail; the next try is in 60 s"):
        gate.acquire(OURS, 1)
    close(gate, gate.acquire(OURS, config.max_wait))
    # All that it was given counts from now on: it may take it up only now.
    units = gate.units()
    assert {one.consumed for one in units} == {clock[0]} and not any(one.doubt for one in units)
    began = clock[0]
    for _ in range(10):
        close(gate, gate.acquire(OURS, config.max_wait))
    assert clock[0] == began


def test_however_long_zulip_is_silent_it_is_tried_again(tmp_path):
    config = make_config(tmp_path, windows=(Window(4, 60), Window(10, 3600)), max_wait=1000)
    clock = [NOW]
    gate = by_clock(config, clock, knows=True)
    for _ in range(15):  # more than the windows have room for
        close(gate, gate.acquire(OURS, 1e6), Deferred("4.4.2", NO_ANSWER, "silent", in_doubt=True))


def test_a_clock_set_back_does_not_stop_the_gateway():
    units = [Unit(1, NOW + 5000, NOW + 5000)]
    pace.correct_clock(units, NOW)
    assert units[0].consumed == units[0].opened == NOW


def test_a_clock_that_was_a_year_ahead(tmp_path):
    """It stops nothing for a year; what was counted then counts as counted now."""
    config = make_config(tmp_path, windows=(Window(3, 60),), slack=1)
    clock = [NOW + 3e7]
    gate = by_clock(config, clock, knows=True)
    for _ in range(3):
        close(gate, gate.acquire(OURS, 1))
    clock[0] = NOW
    close(gate, gate.acquire(OURS, 100))
    assert clock[0] - NOW < 65


def test_a_long_wait_is_deferred_with_the_time(tmp_path):
    config = make_config(tmp_path, windows=(Window(1, 600),), max_wait=1)
    gate = pace.Pace(config, Journal(tmp_path), clock=lambda: NOW, sleep=lambda _: None)
    close(gate, gate.acquire(OURS, config.max_wait))
    with pytest.raises(Trouble, match="may go in 600 s"):
        gate.acquire(OURS, config.max_wait)


def test_a_new_journal_learns_the_last_hour_from_the_workers_log(tmp_path):
    config = make_config(tmp_path, windows=(Window(3, 60), Window(5, 3600)), max_wait=1)
    log = config.logs / "workers.log"
    log.with_suffix(".log.1").write_text(line(NOW - 4000, POSTED) + line(NOW - 3000, POSTED) + "a traceback\n")
    log.write_text(
        line(NOW - 2000, POSTED)
        + line(NOW - 1999, "Successfully processed email from user 9 to general")
        + line(NOW - 1997, "MirrorWorker: Rejecting an email from: x - rate limited.", "zerver.worker.email_mirror")
        + line(NOW - 1000, "Email has no nonempty body sections; ignoring.")
    )
    gate = pace.Pace(config, Journal(tmp_path), clock=lambda: NOW, sleep=lambda _: None)
    close(gate, gate.acquire(OURS, 1))
    units = gate.units()
    assert [round(NOW - one.opened) for one in units] == [3000, 2000, 1000, 0]
    close(gate, gate.acquire(OURS, 1))
    with pytest.raises(Trouble, match="rate limit is used up"):  # 3 of then and 2 of now
        gate.acquire(OURS, 1)


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
        pace.Pace(config, Journal(tmp_path), clock=lambda: NOW, sleep=lambda _: None).acquire(OURS, 1)


def test_zulips_mail_server_needs_no_log(tmp_path):
    config = make_config(tmp_path, url="smtp://127.0.0.1:10525", logs=tmp_path / "none")
    gate = pace.Pace(config, Journal(tmp_path), clock=lambda: NOW, sleep=lambda _: None)
    close(gate, gate.acquire(OURS, 1))


def test_what_was_under_way_when_the_service_was_killed_counts(tmp_path):
    config = make_config(tmp_path, windows=(Window(3, 600),))
    pace.Pace(config, Journal(tmp_path)).acquire(OURS, 1)
    gate = pace.Pace(config, Journal(tmp_path))
    gate.after_a_start()
    (one,) = Journal(tmp_path).units(0)
    assert one.consumed is not None


def test_many_threads_share_the_windows(tmp_path):
    config = make_config(tmp_path, windows=(Window(8, 0.3),), slack=0.001)
    gate = pace.Pace(config, Journal(tmp_path))

    def take() -> None:
        for _ in range(4):
            close(gate, gate.acquire(OURS, 60))

    threads = [threading.Thread(target=take) for _ in range(6)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    # Eight of them in a window, never nine.
    moments = sorted(one.consumed or 0 for one in Journal(tmp_path).units(0))
    assert len(moments) == 24 and moments[0]
    assert all(later - earlier > 0.2999 for earlier, later in zip(moments, moments[8:], strict=False))
