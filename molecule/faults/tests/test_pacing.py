"""Floods, and Zulip's worker and limiter in trouble: all is posted, none dropped.

Each test prints its figures: mails sent, posted, posted twice, dropped by Zulip's
limiter, bounced.
"""

from __future__ import annotations

import time

import pytest
from conftest import ZulipHost, tell, wait
from figures import (
    IN_A_FLOOD,
    SCALED,
    clean,
    dropped_by_zulip,
    flush_until,
    in_a_flood,
    limits,
    replies_in_a_flood,
    report,
    twice,
)


@pytest.fixture
def mx(host) -> ZulipHost:
    return clean(host("mx1"))


def test_a_flood_is_paced(mx, subject):
    limits(mx, SCALED)
    started = time.monotonic()
    assert mx.send(mx.address(), subject=subject, count=200)["accepted"] == 200
    accepted = time.monotonic() - started
    tell(f"200 mails accepted within {accepted:.1f} s")
    assert accepted < 5
    flush_until(mx, subject, 200, 300)
    tell(f"posted within {time.monotonic() - started:.0f} s")
    report(mx, "flood of 200", subject, 200)
    assert twice(mx, subject) == 0


def test_zulips_true_limits_for_70_seconds_with_replies_in_between(mx, subject):
    mx.sh("echo 0.025 0.1 > /run/zulip-standin/consume-seconds")
    assert mx.send(mx.address(), subject=subject, count=200)["accepted"] == 200
    started = time.monotonic()
    slowest = replies_in_a_flood(mx, 20)
    wait(lambda: False, max(0, 70 - (time.monotonic() - started)))
    posted = len(mx.messages(subject))
    dropped = dropped_by_zulip(mx)
    tell(f"true limits, 70 s: posted {posted}, dropped by Zulip {dropped}, slowest reply {slowest:.1f} s")
    assert dropped == 0
    assert 50 <= posted <= 100
    assert slowest <= 5


@pytest.mark.parametrize("name", IN_A_FLOOD)
def test_service_and_journal_in_a_flood(mx, subject, name):
    in_a_flood(mx, subject, name)
