"""Addresses in front of Zulip 11."""

from __future__ import annotations

import pytest
from conftest import ZulipHost, changed, wait
from forged import *  # noqa: F403
from forged import content, forged
from names import *  # noqa: F403
from names import fresh, said


@pytest.fixture
def mx(host) -> ZulipHost:
    return fresh(host("mx2"))


# What is the same for both generations.


def test_zulips_own_sender_takes_bounces_and_nothing_else(mx, subject):
    mx.sh(f"sed -i '1i NOREPLY_EMAIL_ADDRESS = \"noreply@{mx.domain}\"' /etc/zulip/settings.py")
    try:
        assert changed(mx.play()) > 0
        to = f"noreply@{mx.domain}"
        assert mx.send(to, sender="", subject=subject)["accepted"] == 1
        assert mx.send(to, subject=subject, header="Auto-Submitted: auto-replied")["accepted"] == 1
        [[_, code, text]] = mx.send(to, subject=subject)["refused"]
        assert (code, "Zulip only sends from this address, and nobody reads what comes to it" in text) == (550, True)
        dropped = "a bounce or an automatic reply to Zulip's own sender address"
        assert wait(lambda: said(mx).count(dropped) == 2, 20), said(mx)
        assert mx.messages(subject) == []
    finally:
        mx.sh("sed -i '/^NOREPLY_EMAIL_ADDRESS/d' /etc/zulip/settings.py")
        assert changed(mx.play()) > 0


def test_a_former_mail_domain_that_points_elsewhere_is_a_warning(mx):
    gone = "gone.example.net"
    former = [mx.domain.replace("mail", "old"), gone]
    done = mx.play("--check", email_gateway_former_mailnames=former)
    assert done.returncode == 0 and f"WARNING: The MX record of {gone} does not" in done.stdout, done.stdout[-3000:]
    done = mx.play(playbook="doctor", email_gateway_former_mailnames=former)
    assert f"warn   The MX record of {gone} does not" in done.stdout, done.stdout[-3000:]
    assert f"The MX record of {former[0]}" not in done.stdout


def test_checks_switched_off_leave_nothing_behind(mx, subject):
    before = mx.sh(
        "cat /var/backups/zulip-email-gateway/packages; cat /var/backups/zulip-email-gateway/senders-packages"
    )
    assert "rspamd" in before
    try:
        assert changed(mx.play(email_gateway_sender_checks=False)) > 0
        assert mx.sh("dpkg-query -W -f '${Package}\n' rspamd publicsuffix 2>/dev/null || true") == ""
        assert mx.sh("ls -d /etc/rspamd /run/zulip-email-gateway-senders /var/lib/*senders 2>/dev/null || true") == ""
        assert mx.host.run("systemctl cat rspamd zulip-email-gateway-senders").rc != 0
        assert forged(mx, "reject.example", mx.address(), subject)["accepted"] == 1
        assert "Warning" not in content(mx, subject)
    finally:
        assert changed(mx.play()) > 0
