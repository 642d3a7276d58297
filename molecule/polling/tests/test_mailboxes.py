"""Inboxes as people have them, on a server with Zulip 11."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from conftest import ZulipHost, changed, tell, wait
from imap_inbox import POLL, Inbox

LIB = "/usr/local/lib/zulip-email-gateway/email_gateway"
FAILED = "Persönliche Post/Zulip-Failed"


@pytest.fixture
def mx(host) -> ZulipHost:
    return host("mx3")


@pytest.fixture
def inbox(mx, host) -> Inbox:
    one = Inbox(mx, host("imap3"))
    one.empty()
    one.imap.host.run(f"doveadm expunge -u {one.user} mailbox '{FAILED}' all")
    return one


def journal(mx: ZulipHost) -> str:
    return mx.sh(f"journalctl -u {POLL} -n 60 --no-pager")


def test_what_cannot_be_posted_goes_where_folders_may_be(mx, inbox):
    """With a name in characters of its own (RFC 3501, 5.1.3)."""
    inbox.append("x", to=inbox.user.replace("@", f"+general.{'0' * 31}1@"))
    assert wait(lambda: inbox.count(FAILED) == 1, 30), journal(mx)


def other(mx: ZulipHost, inbox: Inbox) -> str:
    row = next(row for row in mx.state()["channels"] if row["name"] == "support")
    return inbox.user.replace("@", f"+support.{row['token']}@")


@pytest.mark.parametrize("copies", [1, 2])
def test_a_mail_to_two_channels(mx, inbox, subject, copies):
    """Of which some providers keep one copy, and others two."""
    both = (inbox.channel, other(mx, inbox))
    mark = subject.replace(" ", ".")
    text = f"Message-ID: <{mark}@example.org>\r\nDate: Mon, 1 Jan 2024 00:00:00 +0000\r\n"
    text += f"From: user@example.org\r\nSubject: {subject}\r\n\r\nHello\r\n"
    inbox.put([f"Delivered-To: {address}\r\nTo: {', '.join(both)}\r\n{text}" for address in both[:copies]])
    assert wait(lambda: inbox.count() == 0, 30), journal(mx)
    assert sorted(message["channel"] for message in mx.wait_for(subject, seconds=10, count=2)) == ["general", "support"]


@contextmanager
def changed_program(mx: ZulipHost, *edits: str) -> Iterator[None]:
    """As if it had a fault: sed's edits of recipient_field.py and polling.py."""
    restart = f"rm -rf {LIB}/__pycache__; systemctl restart {POLL}"
    mx.sh(f"cp -a {LIB} /root/program; {'; '.join(edits)}; {restart}")
    try:
        yield
    finally:
        mx.sh(f"rm -rf {LIB}; mv /root/program {LIB}; {restart}")


@pytest.mark.parametrize("fault", ['crash: __import__("os").abort()', 'hang: exec("while True: pass")'])
def test_a_mail_over_which_the_poller_ends_twice_is_set_aside(mx, inbox, subject, fault):
    """It has a watchdog."""
    name, _, code = fault.partition(": ")
    edits = (
        f"sed -i 's/^    noted = .*/    if b\"{name}@\" in header: {code}\\n&/' {LIB}/recipient_field.py",
        f"sed -i 's/^READ_WITHIN = .*/READ_WITHIN = 3.0/' {LIB}/polling.py",
    )
    with changed_program(mx, *edits):
        mails = [inbox.channel, f"{inbox.channel}, {name}@example.org", inbox.channel]
        for number, to in enumerate(mails):
            inbox.append(f"{subject} {number}", to=to)
        assert wait(lambda: inbox.count(FAILED) == 1, 90), journal(mx)
        assert "is now in Zulip-Failed: the gateway has ended twice while it read its header" in journal(mx)
        assert wait(lambda: inbox.count() == 0, 30), journal(mx)
        assert sorted(message["topic"] for message in mx.messages(subject)) == [f"{subject} 0", f"{subject} 2"]


def test_a_mail_to_itself(mx, inbox):
    said = mx.sh("zulip-email-gateway poll --try --smtp imap3.example.com:587")
    assert "It has come into INBOX after" in said and "Its header tells the address, in To" in said
    assert inbox.count() == 0
    done = mx.host.run("zulip-email-gateway poll --try --smtp imap3.example.com:25")
    assert done.rc != 0 and "cannot send the mail through imap3.example.com:25" in done.stderr


def test_a_login_that_is_no_address_needs_a_pattern(mx):
    text = mx.refusal(email_gateway_login="zulip")
    assert 'email_gateway_pattern is "zulip"' in text and '"username-%s@example.com"' in text


# From here on each test configures the inbox that it is about, and leaves it so; make converge brings back the first.


def test_somebodys_own_inbox_is_not_touched(mx, inbox, subject):
    folder = {"email_gateway_imap_folder": "Persönliche Post/Own mail"}
    inbox.imap.sh(f"doveadm mailbox create -u {inbox.user} 'Persönliche Post/Own mail'")
    inbox.fill(300, "nobody@example.org", "Persönliche Post/Own mail")
    inbox.fill(2, inbox.channel, "Persönliche Post/Own mail", subject)
    state = "md5sum /etc/zulip/* /etc/zulip-email-gateway/*"
    before = mx.sh(state)
    done = mx.play(**folder)
    words = "holds 302 mails, and of the latest 200 only 2 are for Zulip"
    assert done.returncode != 0 and words in " ".join(done.stdout.split()), done.stdout[-2000:]
    assert mx.sh(state) == before and mx.messages(subject) == []
    assert changed(mx.play(**folder, email_gateway_polling_accept_existing=True)) > 0
    assert len(mx.wait_for(subject, seconds=30, count=2)) == 2
    assert wait(lambda: "300 mails are not for Zulip, and stay" in journal(mx), 10), journal(mx)
    assert changed(mx.play(**folder)) == 0  # it is known by now
    mx.sh(f"systemctl restart {POLL}")
    inbox.fill(1, inbox.channel, "Persönliche Post/Own mail", f"{subject} later")
    mx.wait_for(f"{subject} later", seconds=20)
    assert inbox.count("Persönliche Post/Own mail") == 300 and inbox.count(FAILED) == 0


def test_two_hundred_thousand_mails_in_the_folder(mx, inbox, subject):
    mails = "From x@example.org Mon Jan  1 00:00:00 2024\\nFrom: x@example.org\\nTo: nobody@example.org\\n\\nx\\n\\n"
    home = f"/srv/mail/{inbox.user}/second"
    inbox.imap.sh(
        f"mkdir -p {home}; python3 -c \"print('{mails}' * 200_000, end='')\" > {home}/big; chown -R vmail: {home}"
    )
    # A server has such a folder indexed since long; on a busy machine Dovecot takes a minute for it.
    inbox.imap.sh(f"doveadm mailbox status -u {inbox.user} messages Second/big")
    folder = {"email_gateway_imap_folder": "Second/big", "email_gateway_polling_accept_existing": True}
    done = mx.play(**folder, email_gateway_timeout=60)
    assert changed(done) > 0
    looked = "200000 mails are not for Zulip, and stay"
    assert wait(lambda: looked in journal(mx), 300), journal(mx)
    (began,) = inbox.append(subject, folder="Second/big")
    (message,) = mx.wait_for(subject, seconds=60)
    process = mx.sh(f"systemctl show -P MainPID {POLL}").strip()
    memory = int(mx.sh(f"grep VmHWM /proc/{process}/status").split()[1]) / 1024
    tell(f"in a folder of 200,000 mails: posted after {message['at'] - began:.1f} s, poller {memory:.0f} MiB")
    assert memory <= 120
    mx.sh(f"systemctl restart {POLL}")
    (began,) = inbox.append(f"{subject} again", folder="Second/big")
    (message,) = mx.wait_for(f"{subject} again", seconds=60)
    tell(f"and after a restart: {message['at'] - began:.1f} s")


@pytest.mark.parametrize("pattern", ["zulip-%s@in.example.com", "%s@in.example.com"])
def test_an_inbox_with_other_addresses_and_a_login_that_is_none(mx, inbox, subject, pattern):
    variables = {"email_gateway_login": "zulip", "email_gateway_pattern": pattern}
    assert changed(mx.play(**variables)) > 0
    inbox.user = "zulip"
    inbox.append(subject, to=pattern.replace("%s", mx.address().partition("@")[0]))
    mx.wait_for(subject, seconds=20)


def test_a_bridge_on_the_same_host(mx, inbox, subject):
    """Without TLS, which is for nobody but this host."""
    mx.sh(
        "systemd-run --quiet --unit=bridge --socket-property=ListenStream=127.0.0.1:1143"
        " /usr/lib/systemd/systemd-socket-proxyd imap3.example.com:143"
    )
    bridge = {
        **{"email_gateway_imap_server": "127.0.0.1", "email_gateway_imap_port": 1143},
        **{"email_gateway_login": inbox.user, "email_gateway_imap_tls": "none"},
    }
    try:
        assert changed(mx.play(**bridge)) > 0
        inbox.append(subject)
        mx.wait_for(subject, seconds=20)
    finally:
        mx.sh("systemctl stop bridge.socket")
    text = mx.refusal(email_gateway_imap_tls="none")
    assert "would go to imap3.example.com for anybody to read" in text
