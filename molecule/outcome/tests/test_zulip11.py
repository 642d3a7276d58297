"""What becomes of mail inside Zulip 11."""

from __future__ import annotations

import time

import pytest
from conftest import ZulipHost, tell, wait
from rows import *  # noqa: F403
from rows import fresh, quarantine, raw, status, told


@pytest.fixture
def mx(host) -> ZulipHost:
    return fresh(host("mx2"), 11)


def test_a_server_that_answers_500_for_ever_is_restarted(mx, subject):
    """As after a restart of PostgreSQL: nobody has to be called at night."""
    mx.sh("touch /run/zulip-standin/database-restart")
    mx.send(mx.address(), subject=subject, count=3)
    began = time.monotonic()
    assert wait(lambda: mx.sh("postqueue -f") or len(mx.messages(subject)) == 3, 60)
    tell(f"Zulip 11 answers 500 for ever: all posted after {time.monotonic() - began:.0f} s")
    assert status(mx)["server_restarts"] == 1
    assert "answered nothing but 500" in mx.sh("zulip-email-gateway doctor || true")
    # Not again at once: PostgreSQL may be down for long.
    mx.sh("touch /run/zulip-standin/database-restart")
    mx.send(mx.address(), subject=subject + "again")
    time.sleep(12)
    assert status(mx)["server_restarts"] == 1
    mx.sh("rm /run/zulip-standin/database-restart")


def test_what_its_server_can_never_take_in(mx, subject):
    """A control character in a field goes; what is nested too deep is refused. Neither takes room for nothing."""
    mx.send(mx.address(), raw=raw(f"Subject: {subject} a\x0cb\nFrom: a@sender.example.org\n\nhello\n"))
    [message] = mx.wait_for(subject)
    assert message["topic"].endswith("a b")
    deep = "".join(f"Content-Type: multipart/mixed; boundary=b{n}\n\n--b{n}\n" for n in range(300))
    mx.send(mx.address(), raw=raw(f"Subject: deep\nFrom: a@sender.example.org\n{deep}\nx\n"))
    assert wait(lambda: len(told(mx)) == 2, 20)
    assert "5.6.0, status=bounced" in told(mx)[1] and "nested too deeply for Zulip" in told(mx)[1]
    assert "nested too deeply" in quarantine(mx)
    # One for the question whether it knows the address.
    assert status(mx)["windows"][-1]["used"] == 2 and "500 Server error" not in mx.sh("mailq")
