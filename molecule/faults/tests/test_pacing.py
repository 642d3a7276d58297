"""Floods, and Zulip's worker and limiter in trouble: all is posted, none dropped.

Each test prints its figures: mails sent, posted, posted twice, dropped by Zulip's
limiter, bounced.
"""

from __future__ import annotations

import random
import time

import pytest
from conftest import ZulipHost, tell, wait
from figures import (
    ERRORS,
    IN_A_FLOOD,
    SCALED,
    clean,
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
    dropped = len(mx.state()["dropped"])
    tell(f"true limits, 70 s: posted {posted}, dropped by Zulip {dropped}, slowest reply {slowest:.1f} s")
    assert dropped == 0
    assert 50 <= posted <= 100
    assert slowest <= 5


def test_worker_stopped_for_longer_than_a_window(mx, subject):
    limits(mx, SCALED)
    mx.send(mx.address(), subject=subject, count=40)
    wait(lambda: len(mx.messages(subject)) >= 10, 20)
    mx.sh("systemctl kill --signal=KILL zulip-worker; systemctl stop zulip-worker")
    time.sleep(12)
    waiting = mx.state()["waiting"]
    mx.sh("systemctl start zulip-worker")
    flush_until(mx, subject, 40, 120)
    tell(f"In RabbitMQ while the worker was stopped: {waiting} (limit 12)")
    assert waiting <= 12
    report(mx, "worker stopped", subject, 40)


def test_worker_restarted_every_few_seconds(mx, subject):
    limits(mx, SCALED)
    mx.send(mx.address(), subject=subject, count=40)
    rng = random.Random(1)
    for _ in range(10):
        mx.sh("systemctl kill --signal=KILL zulip-worker")
        time.sleep(rng.uniform(0.1, 4))
        mx.sh("systemctl restart zulip-worker")
        time.sleep(rng.uniform(0.5, 2.5))
    flush_until(mx, subject, 40, 120)
    report(mx, "worker restarted", subject, 40)


@pytest.mark.parametrize("name", IN_A_FLOOD)
def test_service_and_journal_in_a_flood(mx, subject, name):
    in_a_flood(mx, subject, name)


def test_redis_down(mx, subject):
    mx.sh("touch /run/zulip-standin/redis-down")
    assert mx.send(mx.address(), subject=subject, count=20)["accepted"] == 20
    assert wait(lambda: mx.sh(f"cat {ERRORS} 2>/dev/null | wc -l").strip() == "20", 30)
    mx.sh("rm /run/zulip-standin/redis-down")
    assert wait(lambda: len(mx.messages(subject)) >= 20, 150), mx.sh("journalctl -u zulip-email-gateway -n 20")
    time.sleep(2)
    report(mx, "redis down", subject, 20)
    assert twice(mx, subject) == 0
    assert "failed inside Zulip, handed over again: 20" in mx.sh("zulip-email-gateway status")
