"""A mail from outside comes into its channel; what is no address is refused at RCPT."""

from __future__ import annotations

import re
import threading
import time

import pytest
import testhosts
from conftest import changed, wait


@pytest.fixture(params=["mx12", "mx13"])
def mx(request, host):
    return host(request.param)


def test_port_25_listens_with_the_mail_name(mx):
    assert mx.host.socket("tcp://0.0.0.0:25").is_listening
    assert mx.banner() == f"220 {mx.domain} ESMTP"
    assert mx.sh("cat /etc/mailname").strip() == mx.domain


ACCEPTED = [
    "general.TOKEN",
    "general+TOKEN",
    "TOKEN",
    "general.TOKEN.show-sender",
    "general.TOKEN.prefer-html.include-quotes",
    "GENERAL.TOKEN_IN_CAPITALS",
]
REFUSED = [
    ("info", 550),
    ("john.smith", 550),
    ("a+b", 550),
    ("x%y.z", 550),
    ('"a b".c', 550),
    ("mm" + 31 * "a", 550),
    ("general." + 31 * "a" + "g", 550),
]


def test_address_map_accepts_and_zulip_gets_it_in_lower_case(mx, subject):
    token = mx.address().partition("@")[0].partition(".")[2]
    recipients = [text.replace("TOKEN_IN_CAPITALS", token.upper()).replace("TOKEN", token) for text in ACCEPTED]
    recipients = [f"{local}@{mx.domain}" for local in recipients] + [mx.reply_address()]
    answer = mx.send(*recipients, subject=subject)
    assert (answer["accepted"], answer["refused"]) == (len(recipients), [])
    # The reply stands in the topic of the message that it answers.
    posted = mx.wait_for(subject, len(recipients) - 1)
    assert sorted(message["rcpt_to"] for message in posted) == sorted(text.lower() for text in recipients[:-1])
    assert any(message["rcpt_to"] == mx.reply_address() for message in mx.messages("lunch"))


def test_delivered_by_hand_it_leaves_nothing_that_only_root_can_read(mx, subject):
    mail = f"Delivered-To: {mx.address()}\\nSubject: {subject}\\n\\nHello\\n"
    mx.sh(f"printf '{mail}' | zulip-email-gateway deliver")
    mx.wait_for(subject)
    assert mx.sh("find /var/lib/zulip-email-gateway ! -user zulip-email-gateway") == ""


def test_a_local_user_whose_mail_goes_to_a_channel(mx, subject):
    """By /etc/aliases: the address that was written to first is none of Zulip's."""
    mx.sh(
        f"cp -p /etc/aliases /root/; echo 'alerts: {mx.address()}, {mx.address('support')}' >> /etc/aliases; newaliases"
    )
    try:
        mx.sh(f"printf 'Subject: {subject}\\n\\nHello\\n' | sendmail alerts")
        assert {one["channel"] for one in mx.wait_for(subject, 2)} == {"general", "support"}
    finally:
        mx.sh("cp -p /root/aliases /etc/aliases; newaliases")


def test_postmaster_has_a_mailbox_on_the_host(mx, subject):
    answer = mx.send(f"postmaster@{mx.domain}", f"Postmaster@{mx.domain.upper()}", "postmaster", subject=subject)
    assert (answer["accepted"], answer["refused"]) == (3, [])
    mx.sh(f"for i in $(seq 300); do [ $(grep -c '{subject}' /var/mail/root) = 3 ] && exit; sleep 0.2; done; exit 1")


@pytest.mark.parametrize(("local", "code"), REFUSED)
def test_address_map_refuses(mx, local, code):
    [[_, got, text]] = mx.send(f"{local}@{mx.domain}")["refused"]
    assert (got, "please copy it from Zulip again" in text) == (code, True)


def test_routes_and_foreign_domains_are_refused(mx):
    routed = mx.send(f"a.b%other.example.org@{mx.domain}", f"@other.example.org:a.b@{mx.domain}")["refused"]
    assert [code for _, code, _ in routed] == [550, 550]
    foreign = mx.send("user@other.example.org", "user@example.com", mx.address().replace(mx.domain, "example.net"))
    assert [(code, "Relay access denied" in text) for _, code, text in foreign["refused"]] == [(554, True)] * 3


def test_relay_is_denied_to_the_host_itself(mx):
    script = (
        "import smtplib; s = smtplib.SMTP('127.0.0.1', 25); s.ehlo(); s.mail('a@example.com');"
        "print(s.rcpt('user@other.example.org')[0])"
    )
    assert mx.python(script).strip() == "554"


def test_starttls_with_zulips_certificate(mx, subject):
    assert mx.send(mx.address(), subject=subject, starttls=True)["accepted"] == 1
    mx.wait_for(subject)
    shown = mx.sh("openssl s_client -starttls smtp -connect 127.0.0.1:25 </dev/null 2>/dev/null")
    assert "subject=CN = zulip.example.com" in shown or "subject=CN=zulip.example.com" in shown


def test_credential_is_readable_by_the_gateway_only(mx):
    file = mx.host.file("/etc/zulip-email-gateway/credential")
    assert (file.user, file.mode) == ("zulip-email-gateway", 0o400)
    assert file.content_string.strip() in mx.sh("cat /etc/zulip/zulip-secrets.conf")


def test_the_service_has_no_rights_it_does_not_need(mx):
    shown = mx.sh("systemd-analyze security --no-pager zulip-email-gateway.service")
    level = re.search(r"Overall exposure level for zulip-email-gateway.service: ([\d.]+)", shown)
    assert level and float(level[1]) <= 2.0, shown


def test_only_the_gateways_user_and_root_submit_mail(mx):
    connect = "import socket; socket.socket(socket.AF_UNIX).connect('/run/zulip-email-gateway/submit')"
    for user, good in (("zulip-email-gateway", True), ("root", True), ("zulip", False), ("www-data", False)):
        done = mx.host.run(f'runuser -u {user} -- python3 -c "{connect}"')
        assert (done.rc == 0) == good, (user, done.stderr)
    for path in mx.sh("find /var/lib/zulip-email-gateway").split():
        file = mx.host.file(path)
        assert file.user == "zulip-email-gateway" and file.mode & 0o077 == 0, path


def test_an_upgrade_of_the_gateway_delays_nothing(mx, subject):
    """Replies come all the time while site.yml replaces the program: none is deferred, none comes twice."""
    deferred = "journalctl -u 'postfix*' | grep -c 'status=deferred' || true"
    before, replies = mx.sh(deferred), len(mx.messages("lunch"))
    mx.sh("echo '# an older version' >> /usr/local/lib/zulip-email-gateway/email_gateway/service.py")
    pid = mx.sh("systemctl show -P MainPID zulip-email-gateway.service")
    done: list[int] = []
    play = threading.Thread(target=lambda: done.append(changed(mx.play("--tags", "zulip"))))
    play.start()
    sent = 0
    while play.is_alive():
        try:
            assert mx.send(mx.reply_address(), text=subject)["accepted"] == 1
            sent += 1
        except testhosts.Failed as error:  # another test may hold all connections of a client
            assert "too many connections" in str(error)
    play.join()
    assert sent > 0 and done[0] > 0 and mx.sh("systemctl show -P MainPID zulip-email-gateway.service") != pid
    assert wait(lambda: len(mx.messages("lunch")) >= replies + sent, 30)
    assert len(mx.messages("lunch")) == replies + sent and mx.sh(deferred) == before


def test_a_restart_right_after_another_takes_no_time(mx):
    """The service looks at port 25 when it starts, where Postfix asks the service before it answers."""
    restart = "systemctl restart zulip-email-gateway.service"
    took = mx.sh(f"for i in 1 2 3; do {restart}; date +%s.%N; {restart}; date +%s.%N; done").split()
    # Postfix would wait for five seconds, each time (milter_command_timeout).
    assert min(float(end) - float(began) for began, end in zip(took[::2], took[1::2], strict=True)) < 4


def test_a_service_that_hangs_stops_no_mail(mx, subject):
    """Nobody is asked for the address, and nobody looks at the header."""
    mx.sh("systemctl kill --signal=STOP zulip-email-gateway.service")
    try:
        began = time.monotonic()
        assert mx.send(mx.address(), subject=subject)["accepted"] == 1
        assert time.monotonic() - began < 20
    finally:
        mx.sh("systemctl kill --signal=CONT zulip-email-gateway.service")
    mx.wait_for(subject)


def test_zulip_was_restarted_once(mx):
    assert mx.sh("wc -l < /var/lib/zulip-standin/restarts").strip() == "1"
    page = mx.python(
        "import ssl, urllib.request; c = ssl._create_unverified_context();"
        "print(urllib.request.urlopen('https://127.0.0.1/', context=c).read().decode())"
    )
    assert mx.address() in page


def test_modules_are_compiled(mx):
    assert (
        mx.sh("ls /usr/local/lib/zulip-email-gateway/email_gateway/__pycache__ | grep -c pyc").strip()
        == mx.sh("ls /usr/local/lib/zulip-email-gateway/email_gateway/*.py | grep -c py").strip()
    )
