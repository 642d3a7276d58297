"""Senders that may be forged, with real DNS records and signatures, for both generations of Zulip."""

from __future__ import annotations

import base64
import email
import subprocess
import time

import dkim
import pytest
import testhosts
from conftest import ZulipHost, changed, wait

WARNING = "**Warning: the sender of this mail may be forged; {} does not vouch for it (DMARC).**"
REJECTED = "5.7.1 this mail does not come from where {} says that its mail comes from (SPF, DKIM, DMARC)"
DNS = "4.4.3 DNS does not say whether this mail's sender may use {}; please try again later"


def forged(mx: ZulipHost, domain: str, to: str, subject: str, **options: object):
    return mx.send(to, sender=f"user@{domain}", subject=subject, **options)


def signed(mx: ZulipHost, subject: str, text: str = "Hello") -> str:
    """A mail of signed.example, in base64."""
    outside = testhosts.inside(f"{mx.prefix}-outside")
    key = subprocess.run((*outside, "cat", "/root/dkim.key"), capture_output=True, check=True).stdout
    mail = f"From: user@signed.example\r\nSubject: {subject}\r\nMessage-ID: <{subject}@x>\r\nDate: x\r\n\r\n{text}\r\n"
    return base64.b64encode(dkim.sign(mail.encode(), b"key", b"signed.example", key) + mail.encode()).decode()


def content(mx: ZulipHost, subject: str) -> str:
    return mx.wait_for(subject)[0]["content"].replace("\r\n", "\n")


def mark(mx: ZulipHost):
    return changed(mx.play(email_gateway_sender_checks="mark")) > 0


def test_who_proves_himself_is_posted_as_always(mx, subject):
    """By his server's address, by a signature though it comes from elsewhere, or with nothing to prove."""
    for number, domain in enumerate(["passes.example", "sender.example.org"]):
        assert forged(mx, domain, mx.address(), f"{subject} {number}")["accepted"] == 1
        assert "Warning" not in content(mx, f"{subject} {number}")
    assert forged(mx, "signed.example", mx.address(), "", raw=signed(mx, f"{subject} s"))["accepted"] == 1
    assert content(mx, f"{subject} s").endswith("Hello")


@pytest.mark.parametrize("domain", ["reject.example", "below.example.com"])
def test_forged_mail_is_rejected_where_its_domain_asks_for_it(mx, subject, domain):
    [[_, code, text]] = forged(mx, domain, mx.address(), subject)["refused"]
    assert (code, text) == (550, REJECTED.format(domain))
    # Also by who sends from a domain of his own, or changes what was signed.
    options = {"sender": "user@passes.example", "author": f"user@{domain}"}
    assert mx.send(mx.address(), subject=subject, **options)["refused"][0][1] == 550
    changed_text = base64.b64encode(base64.b64decode(signed(mx, subject)).replace(b"Hello", b"Bye")).decode()
    assert forged(mx, "signed.example", mx.address(), "", raw=changed_text)["refused"][0][1] == 550
    assert mx.messages(subject) == []


def test_forged_mail_is_marked_where_its_domain_asks_for_caution(mx, subject):
    assert forged(mx, "quarantine.example", mx.address(), subject)["accepted"] == 1
    assert content(mx, subject) == f"{WARNING.format('quarantine.example')}\n\nHello"


@pytest.mark.parametrize("domain", ["none.example", "spf.example"])
def test_a_reply_is_its_senders_own(mx, subject, domain):
    """Whatever his domain says of forged mail; to a channel it may come."""
    [[_, code, text]] = mx.send(mx.reply_address(), sender=f"user@{domain}", text=subject)["refused"]
    assert (code, text) == (550, REJECTED.format(domain))
    assert forged(mx, domain, mx.address(), subject)["accepted"] == 1
    assert "Warning" not in content(mx, subject)
    assert mx.send(mx.reply_address(), sender="user@passes.example", text=f"{subject} mine")["accepted"] == 1
    assert wait(lambda: any(f"{subject} mine" in one["content"] for one in mx.messages("lunch")), 20)
    assert not any(one["content"] == subject for one in mx.messages("lunch"))


@pytest.mark.zulip(11)
def test_where_dns_does_not_answer_mail_comes_later(mx, subject):
    [[_, code, text]] = forged(mx, "dead.example", mx.address(), subject)["refused"]
    assert (code, text) == (450, DNS.format("dead.example"))


def test_two_authors_are_none(mx, subject):
    """DMARC says nothing of such a mail."""
    both = ("user@passes.example", "user@reject.example")
    for author in ("From: {}, {}", "From: {}\r\nFrom: {}", "From : {}\r\nFrom: {}", "from:\r\n {}\r\nFROM: {}"):
        raw = base64.b64encode(f"{author.format(*both)}\r\nSubject: {subject}\r\n\r\nHello\r\n".encode()).decode()
        [[_, code, text]] = forged(mx, "passes.example", mx.address(), "", raw=raw)["refused"]
        # Postfix makes another field of "From :" on the first line.
        assert (code, text) == (550, REJECTED.format("reject.example" if "From :" in author else "its domain"))


def test_results_that_come_with_a_mail_count_for_nothing(mx, subject):
    """Those of others stay; the field that the gateway goes by, and this host's own results, go."""
    own = mx.domain
    fields = [
        f"Authentication-Results: {own}; dmarc=pass",
        "Authentication-Results: other.example; spf=pass",
        f"authentication-results: (a comment; {own}) {own.upper()} 1; dmarc=pass",
        "X-Zulip-Email-Gateway-Sender: dmarc=pass spf=pass domain=reject.example",
        "x-zulip-email-gateway-sender: dmarc=local",
    ]
    [[_, code, _]] = forged(mx, "reject.example", mx.address(), subject, header=fields)["refused"]
    assert code == 550
    mx.sh(": > /var/mail/root")
    options = {"sender": "user@none.example", "header": fields}
    assert mx.send(f"postmaster@{own}", subject=subject, **options)["accepted"] == 1
    assert wait(lambda: subject in mx.sh("cat /var/mail/root"), 20)
    mail = email.message_from_string(mx.sh("cat /var/mail/root"))
    ours, others = mail.get_all("Authentication-Results")
    assert ours.startswith(f"{own};") and "dmarc=fail" in ours and "header.from=none.example" in ours
    assert others == "other.example; spf=pass"
    [field] = mail.get_all("X-Zulip-Email-Gateway-Sender")
    assert set(field.split()) == {"dmarc=fail-none", "spf=fail", "domain=none.example"}


@pytest.mark.zulip(10)
def test_a_mail_of_very_many_parts_costs_nothing(mx, subject):
    """rspamd would take 16 seconds and 3 GiB for it."""
    pid = mx.sh("systemctl show -P MainPID zulip-email-gateway-senders")
    for number, is_taken in ((21_000, False), (5_000, True)):
        began = time.monotonic()
        answer = mx.send(mx.address(), subject=subject, sender="user@passes.example", parts=number)
        assert (answer["accepted"] == 1) == is_taken and time.monotonic() - began < 10
        assert is_taken or "more than 20000 lines that may begin a part" in answer["refused"][0][2]
    mx.wait_for(subject)
    assert mx.sh("systemctl show -P MainPID zulip-email-gateway-senders") == pid


def test_unchecked_mail_is_not_taken(mx, subject):
    began = time.monotonic()
    mx.sh("systemctl stop zulip-email-gateway-senders")
    try:
        assert time.monotonic() - began < 10  # though smtpd is connected with it
        assert mx.sh("systemctl is-failed zulip-email-gateway-senders || true").strip() == "inactive"
        [[_, code, _]] = mx.send(mx.address(), subject=subject)["refused"]
        assert code == 451
        found = mx.host.run("zulip-email-gateway doctor").stdout
        assert "WRONG  zulip-email-gateway-senders.service does not run" in found, found
    finally:
        mx.sh("systemctl start zulip-email-gateway-senders")
    assert wait(lambda: mx.send(mx.address(), subject=subject)["accepted"] == 1, 20)
    mx.wait_for(subject)


@pytest.mark.zulip(10)
def test_marked_only(mx, subject):
    """Mail of all kinds of text: Zulip reads the first plain one, or HTML."""
    html = "<html><head><style>p {display: none}</style></head><body>Hello <b>you</b></body></html>"
    bodies = {
        "base64": f"Content-Transfer-Encoding: base64\r\n\r\n{base64.b64encode('Grüße'.encode()).decode()}\r\n",
        "html": f"Content-Type: text/html\r\n\r\n{html}\r\n",
    }
    try:
        assert mark(mx)
        for name, body in bodies.items():
            mail = f"From: user@reject.example\r\nSubject: {subject} {name}\r\n"
            kind = "" if "Content-Type" in body else "Content-Type: text/plain; charset=utf-8\r\n"
            raw = base64.b64encode(f"{mail}{kind}{body}".encode()).decode()
            assert forged(mx, "reject.example", mx.address(), "", raw=raw)["accepted"] == 1
            posted = content(mx, f"{subject} {name}")
            assert WARNING.format("reject.example").strip("*") in posted, posted
            assert ("Grüße" if name == "base64" else "Hello you") in posted, posted
    finally:
        assert changed(mx.play()) > 0


@pytest.mark.zulip(11)
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
