"""Fixtures for several of the unit tests."""

from __future__ import annotations

import pytest
from email_gateway.backend_http import HttpBackend
from email_gateway.gateway import Gateway
from email_gateway.journal import Journal
from email_gateway.verdict import Delivered
from mails import spool, text
from test_config import make_config


@pytest.fixture
def gateway(tmp_path, monkeypatch):
    """A gateway whose Zulip answers what .answers says, the last answer again and again."""
    made = Gateway(make_config(tmp_path), Journal(tmp_path))
    spool(tmp_path)
    with made.journal.change() as database:  # the last hour is known: nothing
        made.journal.write_note(database, "consumption unknown", None)
    made.answers, made.handed = [Delivered()], []

    def hand_over(self, recipient, message, _):
        made.handed.append((recipient, text(message)))
        verdict = made.answers[0] if len(made.answers) == 1 else made.answers.pop(0)
        if isinstance(verdict, BaseException):
            raise verdict
        return verdict

    monkeypatch.setattr(HttpBackend, "hand_over", hand_over)
    return made
