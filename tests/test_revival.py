"""Zulip's mail server that answers nothing but 500."""

from __future__ import annotations

import time

import pytest
from email_gateway import backend_smtp, revival
from email_gateway.gateway import Gateway
from email_gateway.journal import Journal
from email_gateway.verdict import Deferred, Refused
from mails import spool
from test_config import make_config

BROKEN = Deferred("4.3.2", "SMTP 500", "answers 500")
UNKNOWN = Refused("5.1.1", "unknown address", "no")


@pytest.fixture
def gateway(tmp_path, monkeypatch):
    made = Gateway(make_config(tmp_path, url="smtp://127.0.0.1:1"), Journal(tmp_path))
    spool(tmp_path)
    made.says, made.asked = BROKEN, 0

    def knows(self, *_):
        made.asked += 1
        return made.says

    monkeypatch.setattr(backend_smtp.SmtpBackend, "knows", knows)
    made.request = tmp_path / "restart-server"
    return made


def revive(gateway):
    return revival.revive(gateway, gateway.request)


def test_only_a_server_that_has_failed_is_asked(gateway):
    assert not revive(gateway) and gateway.asked == 0


def test_it_is_restarted_at_most_once_in_five_minutes(gateway, monkeypatch):
    for _ in range(3):
        gateway.backend().said_500 = True
        revive(gateway)
    assert gateway.request.exists() and gateway.asked == 1
    assert gateway.journal.counts() == {revival.RESTARTED: {"500": 1}}
    later = time.time() + 301
    monkeypatch.setattr(time, "time", lambda: later)
    assert revive(gateway) and gateway.journal.counts() == {revival.RESTARTED: {"500": 2}}


@pytest.mark.parametrize("says", [UNKNOWN, Deferred("4.4.1", "connection refused", "nothing listens")])
def test_one_that_knows_its_addresses_is_left_alone(gateway, says):
    """It has failed with a mail, as with redis down; or it is being restarted."""
    gateway.backend().said_500 = True
    gateway.says = says
    assert not revive(gateway) and not gateway.request.exists()
