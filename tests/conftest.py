"""Fixtures for several of the unit tests."""

from __future__ import annotations

import pytest
from email_gateway import outcome
from email_gateway.backend_http import HttpBackend
from email_gateway.gateway import Gateway
from email_gateway.journal import Journal
from email_gateway.verdict import Delivered
from mails import spool, tell, text
from test_config import make_config


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No test waits for Zulip's worker as long as the service does."""
    for name, seconds in (("PROMPT", 0.3), ("DOUBTFUL", 0.1), ("_SAYS_SO", 0.2), ("_QUIET", 0.3), ("_PAUSE", 0.02)):
        monkeypatch.setattr(outcome, name, seconds)


@pytest.fixture
def gateway(tmp_path, monkeypatch):
    """A gateway whose Zulip answers what .answers says, the last answer again and again; its
    worker tells .tells (texts of lines) of what it was given, by default that it was posted."""
    made = Gateway(make_config(tmp_path), Journal(tmp_path))
    spool(tmp_path)
    with made.journal.change() as database:  # the last hour is known: nothing
        made.journal.write_note(database, "consumption unknown", None)
    made.answers, made.handed, made.tells = [Delivered()], [], None

    def hand_over(self, recipient, message, _):
        made.handed.append((recipient, text(message)))
        verdict = made.answers[0] if len(made.answers) == 1 else made.answers.pop(0)
        if isinstance(verdict, BaseException):
            raise verdict
        if isinstance(verdict, Delivered):
            posted = (
                f"Successfully processed email {'from user 9 to' if recipient[:2] == 'mm' else 'to'} general (zulip)"
            )
            tell(made.config.logs, *([posted] if made.tells is None else made.tells))
        return verdict

    monkeypatch.setattr(HttpBackend, "hand_over", hand_over)
    return made
