"""What status and doctor tell of Postfix's queue, however long it is."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from email_gateway import status


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """postqueue(1) says that these mails wait."""

    def wait(*reasons: str) -> None:
        mails = [
            {"queue_name": "deferred", "arrival_time": 1, "recipients": [{"address": "a@x", "delay_reason": reason}]}
            for reason in reasons
        ]
        (tmp_path / "queue").write_text("".join(json.dumps(mail) + "\n" for mail in mails))
        program = Path(tmp_path / "postqueue")
        program.write_text(f"#!/bin/sh\ncat {tmp_path}/queue\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return wait


def test_one_line_for_each_reason(queue):
    """Not for each number of seconds in it."""
    waits = [f"Zulip's rate limit is used up; the next mail may go in {number} s" for number in range(2800)]
    queue(*waits, *(f"Zulip at x did not answer within {number}.5 s; look" for number in range(5)), "down\x1b[2J")
    told = status._queue()
    assert told is not None and told["mails"] == 2806
    assert told["reasons"] == {
        "Zulip's rate limit is used up; the next mail may go in some s": 2800,
        "Zulip at x did not answer within some s; look": 5,
        "down\x1b[2J": 1,
    }


def test_no_queue(queue, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert status._queue() is None
