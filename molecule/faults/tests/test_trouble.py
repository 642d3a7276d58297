"""Zulip's web server, Postfix, the disk or the program in trouble: mail only waits.

Each test prints its figures, as in test_pacing.py.
"""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from conftest import ZulipHost, tell, wait
from figures import (
    ACCEPTING,
    CLIENT,
    JOURNAL,
    NGINX_DOWN,
    SERVICE,
    SOCKETS,
    STATE,
    WIDE,
    ZULIP_DOWN,
    Fault,
    all_posted_after,
    broken,
    clean,
    flush_until,
    instead_of,
    killed_at_random_moments,
    limits,
    postfix_stopped_and_host_restarted,
    report,
)


@pytest.fixture
def mx(host) -> ZulipHost:
    return clean(host("mx2"))


def wrong_answers(mode: str) -> Fault:
    return instead_of("nginx", 443, Path(__file__).with_name("faulty_web.py"), mode)


PACKAGE = "/usr/local/lib/zulip-email-gateway/email_gateway"
SECRETS = "/etc/zulip/zulip-secrets.conf"
FAULTS = {
    "web server stopped": (NGINX_DOWN, "nothing listens on 127.0.0.1:443"),
    "application server stopped": (ZULIP_DOWN, "HTTP 502"),
    "wrong secret": (
        Fault(
            f"sed -i.before 's/^shared_secret = ./shared_secret = x/' {SECRETS}; systemctl restart zulip-web",
            f"mv {SECRETS}.before {SECRETS}; systemctl restart zulip-web",
        ),
        "shared secret has changed",
    ),
    "500": (wrong_answers("500"), "HTTP 500"),
    "404": (wrong_answers("404"), "there is no mail endpoint"),
    "HTML 400": (wrong_answers("html400"), "HTTP 400 without a verdict"),
    "a proxy's 200": (wrong_answers("html200"), "does a proxy answer"),
    "empty answer": (wrong_answers("empty"), "connection to 127.0.0.1:443 broke"),
    "half an answer": (wrong_answers("half"), "connection to 127.0.0.1:443 broke"),
    "no answer": (wrong_answers("silent"), "did not answer within 4 s"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_zulip_in_trouble(mx, subject, name):
    all_posted_after(mx, subject, name, *FAULTS[name])


@pytest.mark.parametrize("victim", [SERVICE, CLIENT])
def test_program_killed_at_random_moments(mx, subject, victim):
    killed_at_random_moments(mx, subject, victim)


def test_postfix_stopped_and_host_restarted(mx, subject):
    postfix_stopped_and_host_restarted(mx, subject, ZULIP_DOWN, "HTTP 502")


# What goes wrong with the gateway's own files, and what is said of a mail meanwhile.
SPOIL = {
    "state folder not writable": (
        Fault(f"chown root {STATE} {STATE}/spool", f"chown zulip-email-gateway {STATE} {STATE}/spool"),
        f"cannot store the message in {STATE}/spool: Permission denied",
    ),
    "journal read-only": (
        Fault(
            f"systemctl stop zulip-email-gateway; chown root {JOURNAL}*; systemctl start zulip-email-gateway",
            f"chown zulip-email-gateway {JOURNAL}*",
        ),
        f"cannot use the journal in {STATE}: ",
    ),
    "disk full": (
        Fault(
            f"""systemctl stop zulip-email-gateway.service
            chown zulip-email-gateway /mnt/small; mv {STATE}/spool /root/aside; ln -s /mnt/small {STATE}/spool
            head -c 9000 /dev/zero > /mnt/small/full || true; systemctl start zulip-email-gateway.service""",
            f"rm {STATE}/spool; rm /mnt/small/*; mv /root/aside {STATE}/spool",
        ),
        "No space left on device",
    ),
    "configuration unparsable": (
        Fault(
            "sed -i.before 's/^\\[zulip\\]/[zulip/' /etc/zulip-email-gateway/gateway.conf",
            "mv /etc/zulip-email-gateway/gateway.conf.before /etc/zulip-email-gateway/gateway.conf",
        ),
        "cannot use /etc/zulip-email-gateway/gateway.conf",
    ),
    "credential missing": (
        Fault(
            "mv /etc/zulip-email-gateway/credential /root/credential",
            "mv /root/credential /etc/zulip-email-gateway/credential",
        ),
        "cannot read /etc/zulip-email-gateway/credential: No such file",
    ),
    "program broken": (
        Fault(
            f"mv {PACKAGE}/submission.py /root/; rm -r {PACKAGE}/__pycache__",
            f"mv /root/submission.py {PACKAGE}/",
        ),
        "cannot start the gateway",
    ),
    "program missing": (
        Fault("mv /usr/local/bin/zulip-email-gateway /root/", "mv /root/zulip-email-gateway /usr/local/bin/"),
        "zulip-email-gateway",
    ),
    "service and socket stopped": (
        Fault(
            f"systemctl stop {SOCKETS} zulip-email-gateway.service",
            f"systemctl start {SOCKETS} zulip-email-gateway.service",
        ),
        "the service cannot be reached at /run/zulip-email-gateway/submit",
    ),
}


@pytest.mark.parametrize("name", SPOIL)
def test_our_own_trouble_only_delays(mx, subject, name):
    """5 mails are deferred with these words, and posted once it is over."""
    fault, words = SPOIL[name]
    limits(mx, WIDE)
    with broken(mx, fault):
        mx.send(mx.address(), subject=subject, count=5)
        assert wait(lambda: words in " ".join(mx.sh("mailq").split()), 20), mx.sh("mailq")
    flush_until(mx, subject, 5, 30)
    report(mx, name, subject, 5)


def test_around_the_size_limit(mx, subject):
    plain = int(mx.sh("postconf -h message_size_limit").strip())
    below = mx.send(mx.address(), subject=subject + "below", size=plain - 2000)
    assert below["accepted"] == 1
    above = mx.send(mx.address(), subject=subject + "above", size=plain + 1)
    [[_, code, text]] = above["refused"]
    assert (code, "message file too big" in text) == (552, True)
    mx.wait_for(subject + "below", seconds=60)
    # Below Postfix's limit, but its base64 is full of + and /: over 25 MiB as a form.
    mx.send(mx.address(), subject=subject + "binary", size=plain - 2000, binary=True)
    found = r"status=bounced \(Zulip mail gateway: the message is too large for Zulip: .* limits to 26214400"
    assert wait(lambda: re.search(found, mx.sh("journalctl --since=-2min -u 'postfix*'")), 60)
    tell(f"size: {plain - 2000} bytes posted, {plain + 1} bytes refused at SMTP: {code} {text}")


def test_unknown_token_is_told_and_kept_and_can_be_replayed(mx, subject):
    token = f"{time.monotonic_ns():032x}"
    secret = mx.sh("cat /etc/zulip-email-gateway/credential").strip()
    mx.sh("zulip-email-gateway quarantine purge --all")
    with broken(mx, ACCEPTING):
        mx.send(f"new.{token}@{mx.domain}", subject=subject, sender=f"root@{mx.domain}")
    bounce = wait(lambda: mx.host.run(f"grep -A 40 -B 40 '{token}' /var/mail/root").stdout, 20)
    assert "Zulip mail gateway: Bad destination mailbox address" in " ".join(bounce.split())
    assert secret not in bounce
    listed = mx.sh("zulip-email-gateway quarantine list")
    assert token not in listed and token[:4] in listed and "Bad destination mailbox address" in listed
    number = listed.split(" ")[0]
    envelope = mx.sh(f"zulip-email-gateway quarantine show {number} 2>&1 >/root/mail")
    assert "Bad destination mailbox address" in envelope and token not in envelope
    assert f"Subject: {subject}" in mx.sh("cat /root/mail") and "reason:" not in mx.sh("cat /root/mail")
    assert mx.sh("zulip-email-gateway quarantine purge --older-than 1").strip() == "0 removed"
    mx.in_zulip(f"INSERT INTO channel VALUES ('{token[-6:]}', 'new', '{token}')")
    assert "posted in Zulip" in mx.sh(f"zulip-email-gateway quarantine replay {number}")
    mx.wait_for(subject)
    assert mx.sh("zulip-email-gateway quarantine list") == ""


def test_addresses_do_not_show_in_status(mx):
    token = mx.address().partition("@")[0].partition(".")[2]
    with broken(mx, NGINX_DOWN):
        mx.send(mx.address())
        assert wait(lambda: "nothing listens" in mx.sh("zulip-email-gateway status"), 20)
        assert token not in mx.sh("zulip-email-gateway status")
