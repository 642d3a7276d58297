"""A hand-over in a process of its own: what it writes down, whoever is killed."""

from __future__ import annotations

import os
import signal
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
from email_gateway.addresses import Pattern
from email_gateway.apart import deliver_apart
from email_gateway.delivery import Envelope, Gateway
from email_gateway.verdict import Deferred, Delivered, Refused
from test_addresses import TOKEN
from test_config import make_config

MAIL = Envelope(f"general.{TOKEN}@example.com", uid=("inbox", 1))


@pytest.fixture
def gateway(tmp_path: Path) -> Gateway:
    return Gateway(make_config(tmp_path, pattern=Pattern("", "example.com")))


@pytest.fixture
def zulip(monkeypatch):
    """zulip(f): Zulip takes a mail as f does."""
    return lambda take: monkeypatch.setattr("email_gateway.backend_http.HttpBackend.hand_over", lambda *_: take())


@pytest.mark.parametrize("verdict", [Delivered("yes"), Deferred("4.3.2", "HTTP 502", "no"), Refused("5.1.1", "x", "y")])
def test_the_verdict_comes_back(gateway, zulip, verdict):
    zulip(lambda: verdict)
    assert deliver_apart(gateway, MAIL, b"Subject: S\n\nx") == verdict
    assert gateway.state.look().get("accepted", []) == ([["inbox", 1]] if isinstance(verdict, Delivered) else [])
    assert list(gateway.quarantine.items()) == []


def test_what_is_killed_in_the_middle_of_a_hand_over_has_still_written_it_down(gateway, zulip, tmp_path):
    def take():
        (tmp_path / "began").touch()
        time.sleep(0.5)
        return Delivered()

    zulip(take)
    service = get_context("fork").Process(target=deliver_apart, args=(gateway, MAIL, b"Subject: S\n\nx"))
    service.start()
    while not (tmp_path / "began").exists():
        time.sleep(0.01)
    service.kill()
    service.join()
    assert gateway.state.look().get("accepted", []) == []
    end = time.monotonic() + 10
    while not gateway.state.look().get("accepted") and time.monotonic() < end:
        time.sleep(0.05)
    assert gateway.state.look()["accepted"] == [["inbox", 1]]


def test_a_child_that_is_killed_defers(gateway, zulip):
    zulip(lambda: os.kill(os.getpid(), signal.SIGKILL))
    verdict = deliver_apart(gateway, MAIL, b"Subject: S\n\nx")
    assert isinstance(verdict, Deferred) and "was killed" in verdict.reason


def test_a_bug_defers_and_says_what_it_is(gateway, zulip):
    zulip(lambda: 1 / 0)
    verdict = deliver_apart(gateway, MAIL, b"Subject: S\n\nx")
    assert isinstance(verdict, Deferred) and "ZeroDivisionError" in verdict.reason
