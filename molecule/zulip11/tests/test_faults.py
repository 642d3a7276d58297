"""Zulip's SMTP server in trouble: mail only waits; floods cost few tries.

mx1 had Zulip's own mail server on port 25, which the gateway has taken over.
"""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from conftest import ZulipHost, changed, tell, wait
from figures import (
    ACCEPTING,
    CLIENT,
    REDIS_DOWN,
    SCALED,
    SERVICE,
    WIDE,
    Fault,
    all_posted_after,
    bounces,
    broken,
    clean,
    flush_until,
    in_a_flood,
    instead_of,
    killed_at_random_moments,
    limits,
    postfix_stopped_and_host_restarted,
    replies_in_a_flood,
    report,
    stopped,
    twice,
)

SERVER = "zulip-email-gateway-server"


@pytest.fixture
def mx(host) -> ZulipHost:
    return clean(host("mx1"))


def test_a_mail_arrives(mx, subject):
    mx.send(mx.address(), subject=subject)
    mx.wait_for(subject)
    mx.send(mx.reply_address(), text=subject)
    assert wait(lambda: any(subject in message["content"] for message in mx.messages("lunch")), 20)


def test_zulips_own_server_has_given_up_port_25(mx):
    assert "puppet_classes = zulip::profile::standalone\n" in mx.sh("cat /etc/zulip/zulip.conf")
    assert mx.banner() == f"220 {mx.domain} ESMTP"
    # What every upgrade of Zulip does must not touch Postfix.
    mx.sh("/home/zulip/deployments/current/scripts/zulip-puppet-apply -f")
    assert mx.banner() == f"220 {mx.domain} ESMTP"


def test_only_loopback_reaches_zulips_server(mx):
    listening = mx.sh("ss -Hltn 'sport = :10525'")
    assert "127.0.0.1:10525" in listening and "0.0.0.0" not in listening.partition("127.0.0.1")[0]
    assert mx.sh(f"ps -o user= -p $(systemctl show -P MainPID {SERVER})").strip() == "zulip"
    hardened = mx.sh(
        f"systemctl show -P NoNewPrivileges -P ProtectSystem -P PrivateTmp -P CapabilityBoundingSet {SERVER}"
    )
    assert hardened.split() == ["yes", "strict", "yes"], hardened


def test_it_is_restarted_when_it_dies_and_after_an_upgrade_and_with_new_settings(mx):
    def pid() -> str:
        return mx.sh(f"systemctl show -P MainPID {SERVER}").strip()

    for cause in (
        f"systemctl kill --signal=KILL {SERVER}",
        "sh /opt/zulip-standin/upgrade 11.5",
        "echo '# changed' >> /etc/zulip/settings.py",
    ):
        wait(lambda: mx.host.run(f"systemctl is-active {SERVER}-restart").stdout.strip() == "inactive", 20)
        before = pid()
        mx.sh(cause)
        assert wait(lambda before=before: pid() not in ("0", before), 20), cause
    assert wait(lambda: mx.host.run("zulip-email-gateway check").rc == 0, 20)


def test_unknown_token_is_a_verdict(mx, subject):
    token = f"{time.monotonic_ns():032x}"
    with broken(mx, ACCEPTING):
        mx.send(f"new.{token}@{mx.domain}", subject=subject)
    assert wait(lambda: "Bad destination mailbox address" in mx.sh("zulip-email-gateway quarantine list"), 20)
    assert wait(lambda: bounces(mx) == mx.bounced_before + 1, 10)  # Postfix says it after our copy is kept
    number = mx.sh("zulip-email-gateway quarantine list").split(" ")[0]
    mx.in_zulip(f"INSERT INTO channel VALUES ('{token[-6:]}', 'new', '{token}')")
    assert "posted in Zulip" in mx.sh(f"zulip-email-gateway quarantine replay {number}")
    mx.wait_for(subject)


def test_postmaster_has_a_mailbox(mx, subject):
    assert mx.send(f"postmaster@{mx.domain}", subject=subject)["accepted"] == 1
    mx.sh(f"for i in $(seq 300); do grep -qs '{subject}' /var/mail/root && exit; sleep 0.1; done; exit 1")


@pytest.mark.parametrize(
    "header", ["X-RcptTo: TARGET", "x-rcptto: TARGET", "X-RcptTo:\\n TARGET", "Received: x\\rX-RcptTo: TARGET"]
)
def test_headers_only_zulip_may_set_lead_nowhere(mx, subject, header):
    """Zulip reads the first X-RcptTo: one that came with the mail would direct it."""
    mx.send(mx.address(), subject=subject, header=header.replace("TARGET", mx.address("support")))
    (message,) = mx.wait_for(subject)
    assert message["channel"] == "general"


def test_systemds_journal_has_no_whole_address(mx, subject):
    """Zulip's mail server tells fifteen lines of each mail."""
    mx.send(mx.address(), subject=subject)
    mx.wait_for(subject)
    token = mx.address().partition("@")[0].partition(".")[2]
    assert token in mx.sh("journalctl -u 'postfix*' --since=-1min")  # Postfix's own has
    assert token not in mx.sh(f"journalctl -u '{SERVER}' -u zulip-email-gateway")


def test_long_lines_arrive(mx, subject):
    mx.send(mx.address(), subject=subject, text="x" * 3000)
    (message,) = mx.wait_for(subject)
    assert len(re.sub(r"\s", "", message["content"])) == 3000


def test_size_limits_agree(mx, subject):
    limit = int(mx.sh("postconf -h message_size_limit").strip())
    assert limit == 33554432
    below = mx.send(mx.address(), subject=subject + "below", size=limit - 1000000)
    assert below["accepted"] == 1
    [[_, code, text]] = mx.send(mx.address(), subject=subject + "above", size=limit + 1)["refused"]
    assert (code, "message file too big" in text) == (552, True)
    flush_until(mx, subject + "below", 1, 60)
    assert mx.messages(subject + "below")
    tell(f"size: {limit - 1000000} bytes posted, {limit + 1} bytes refused at SMTP: {code} {text}")


def test_a_flood_is_paced(mx, subject):
    """And replies do not wait behind it."""
    limits(mx, SCALED)
    before = tries(mx)
    assert mx.send(mx.address(), subject=subject, count=200)["accepted"] == 200
    slowest = replies_in_a_flood(mx, 20)
    flush_until(mx, subject, 200, 300)
    report(mx, "flood of 200", subject, 200)
    assert twice(mx, subject) == 0
    tell(f"flood of 200: {tries(mx) - before} rate-limited answers of Zulip, slowest of 20 replies {slowest:.1f} s")
    assert tries(mx) - before <= 8
    assert slowest <= 5


def tries(mx: ZulipHost) -> int:
    """How often Zulip had to say that its limit is used up."""
    return mx.sh("journalctl -u 'postfix*' --since=-5min").count("by its own account")


# The others, and faults of the service's state, are the same for all generations: see faults/.
@pytest.mark.parametrize("name", ["service killed", "journal deleted and service restarted"])
def test_service_and_journal_in_a_flood(mx, subject, name):
    in_a_flood(mx, subject, name)


def test_zulips_own_meter_decides(mx, subject):
    """Somebody else uses up Zulip's limit: few tries, replies go on, all is posted."""
    limits(mx, WIDE, zulip="12/20")
    before = tries(mx)
    assert mx.send(mx.address(), subject=subject, count=30)["accepted"] == 30
    assert wait(lambda: tries(mx) > before, 30)
    assert replies_in_a_flood(mx, 1) <= 5
    assert wait(lambda: len(mx.messages(subject)) == 30, 200)
    tell(f"Zulip's own meter: 30 mails at 12 in 20 s took {tries(mx) - before} rate-limited answers")
    assert tries(mx) - before <= 12
    report(mx, "Zulip's own meter", subject, 30)


def wrong_answers(mode: str) -> Fault:
    return instead_of(SERVER, 10525, Path(__file__).with_name("faulty_smtp.py"), mode)


FAULTS = {
    "server stopped": (stopped(SERVER), "nothing listens on 127.0.0.1:10525"),
    "redis down (500 after RCPT)": (REDIS_DOWN, "answers 500 Server error"),
    "421 at once": (wrong_answers("greet421"), "answers 421"),
    "421 TLS trouble": (wrong_answers("tls421"), "answers 421 4.7.6"),
    "5xx after DATA": (wrong_answers("data554"), "answers 554"),
    "connection cut in DATA": (wrong_answers("cut"), "the connection to 127.0.0.1:10525 broke"),
    "connection closed at once": (wrong_answers("close"), "the connection to 127.0.0.1:10525 broke"),
    "no answer": (wrong_answers("silent"), "did not answer within 4 s"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_zulip_in_trouble(mx, subject, name):
    all_posted_after(mx, subject, name, *FAULTS[name])
    assert twice(mx, subject) == 0


@pytest.mark.parametrize("victim", [SERVICE, CLIENT])
def test_program_killed_at_random_moments(mx, subject, victim):
    killed_at_random_moments(mx, subject, victim)


def test_postfix_stopped_and_host_restarted(mx, subject):
    postfix_stopped_and_host_restarted(mx, subject, stopped(SERVER), "nothing listens on 127.0.0.1:10525")


def test_switched_off_zulips_own_server_comes_back(mx, subject):
    """The last one here: the class is given back, and Puppet starts its server again."""
    assert changed(mx.play(zulip_puppet_classes="zulip::profile::standalone")) > 0
    assert "zulip::local_mailserver" in mx.sh("grep ^puppet_classes /etc/zulip/zulip.conf")
    assert wait(lambda: "Zulip Server" in mx.banner(), 20)
    assert mx.sh("find /etc/systemd/system -name 'zulip-email-gateway*'") == ""
    assert changed(mx.play(zulip_puppet_classes="zulip::profile::standalone")) == 0
