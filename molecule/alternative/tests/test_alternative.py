"""Every variable has the effect it is documented to have."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import testhosts
import yaml
from conftest import PROJECT, ZulipHost, changed, wait

DOMAIN = "mail.alternative.example.com"


@pytest.fixture
def mx(host):
    one = host("mx")
    one.domain = DOMAIN
    return one


def test_all_variables_are_set_and_differ_from_their_defaults():
    here = yaml.safe_load((PROJECT / "molecule/alternative/inventory.yml").read_text())["zulip"]["vars"]
    # Of the test hosts, of other scenarios (polling, zulip11, addresses), and what site.yml fills in.
    elsewhere = {
        "email_gateway_dns_servers",
        "email_gateway_zulip_api_url",
        "email_gateway_zulip_server",
        "postfix_localmail_aliases",
        "postfix_localmail_checks_senders",
        "postfix_localmail_former_patterns",
        "postfix_localmail_sends_from",
        "postfix_localmail_takeover",
        "postfix_localmail_zulip_sends_here",
    }
    polling = ("_login", "_password", "_imap_", "_oauth_", "_polling_")
    for role in ("email_gateway", "postfix_localmail"):
        options = yaml.safe_load((PROJECT / f"roles/{role}/meta/argument_specs.yml").read_text())
        for name, option in options["argument_specs"]["main"]["options"].items():
            if (
                name in elsewhere
                or any(part in name for part in polling)
                or (option.get("required") and role == "postfix_localmail")
            ):
                continue
            assert name in here and here[name] != option.get("default"), name


def test_pattern_with_a_user_part(mx, subject):
    local = mx.address().partition("@")[0]
    answer = mx.send(f"user+{local}@{DOMAIN}", f"USER+{local.upper()}@{DOMAIN}", f"{local}@{DOMAIN}", subject=subject)
    assert (answer["accepted"], [code for _, code, _ in answer["refused"]]) == (2, [550])
    assert {message["rcpt_to"] for message in mx.wait_for(subject, 2)} == {f"user+{local}@{DOMAIN}"}
    reply = mx.reply_address()
    assert mx.send(f"user+{reply}", text=subject)["accepted"] == 1
    mx.wait_for("lunch")


def test_an_alias_with_a_user_part(mx, subject):
    """Also at the former mail domain. The scenario addresses has the rest."""
    for address in (f"user+help@{DOMAIN}", "user+Help@mail.former.example.com"):
        assert mx.send(address, subject=subject)["accepted"] == 1
    assert {message["channel"] for message in mx.wait_for(subject, 2)} == {"support"}
    refused = mx.send(f"help@{DOMAIN}", subject=subject)["refused"]
    refused += mx.send(f"user+help@{DOMAIN}", sender="user@example.net", subject=subject)["refused"]
    refused += mx.send(f"user+{mx.address('日本語')}", sender="user@example.org", subject=subject)["refused"]
    words = ["5.1.1", "this sender is blocked here", "only certain senders may write to this address"]
    for [_, code, text], word in zip(refused, words, strict=True):
        assert code == 550 and word in text


def test_senders_are_checked_but_for_the_exceptions(mx, subject):
    """The tests are among these; the scenario addresses has the rest."""
    assert "\nsender_checks = mark\n" in mx.sh("cat /etc/zulip-email-gateway/gateway.conf")
    found = mx.sh("systemctl is-active zulip-email-gateway-senders; systemctl is-enabled zulip-email-gateway-senders")
    assert found.split() == ["active", "enabled"]
    assert mx.send(f"user+help@{DOMAIN}", subject=subject)["accepted"] == 1
    assert "Warning" not in mx.wait_for(subject)[0]["content"]


METRICS = "/srv/zulip-email-gateway.prom"


def test_metrics_are_written_and_go_when_they_are_not_wanted(mx, subject):
    assert mx.send(f"user+help@{DOMAIN}", subject=subject)["accepted"] == 1
    mx.wait_for(subject)
    posted = "grep 'posted_total{channel=\"support (zulip)\"}' " + METRICS
    assert wait(lambda: mx.host.run(posted).rc == 0, 40), mx.sh(f"cat {METRICS}")
    assert mx.sh(f"stat -c '%a %U' {METRICS}") == "644 root\n"
    assert mx.sh("systemctl show -P Result zulip-email-gateway-metrics.service") == "success\n"
    assert changed(mx.play(email_gateway_metrics_file="")) > 0
    assert mx.sh("ls /srv") == "" and mx.host.run("systemctl cat zulip-email-gateway-metrics.timer").rc != 0
    assert changed(mx.play()) > 0
    assert wait(lambda: mx.host.run(f"test -e {METRICS}").rc == 0, 40)


def test_a_probe_is_sent_and_followed(mx):
    mx.sh("systemctl is-active zulip-email-gateway-probe.timer; systemctl start zulip-email-gateway-probe.service")
    assert mx.wait_for("Email gateway: probe")[0]["channel"] == "support"
    assert "ok     the last probe was posted after " in mx.host.run("zulip-email-gateway doctor").stdout
    shown = mx.sh(f"echo user+help@{DOMAIN} | zulip-email-gateway probe")
    assert "Postfix has accepted it after" in shown and "Posted in Zulip after" in shown
    assert wait(lambda: "probe_success 1" in mx.sh(f"cat {METRICS}"), 40)


def test_limits_for_clients(mx):
    """The exceptions come through postscreen at once, and the tests with them."""
    names = ["connection_count_limit", "message_rate_limit", "recipient_rate_limit", "event_limit_exceptions"]
    found = mx.sh("postconf -h " + " ".join(f"smtpd_client_{name}" for name in names)).split("\n")
    assert found[:3] == ["20", "120", "240"] and "[2001:db8::]/32" in found[3]
    assert "postscreen" in mx.sh("postconf -M smtp/inet") and "2001:db8::/32  permit" in mx.sh(
        "cat /etc/postfix/exceptions.cidr"
    )
    assert mx.sh("postconf -h postscreen_dnsbl_sites").strip() == "list.example.net"


def test_windows_and_hosts(mx):
    windows = json.loads(mx.sh("zulip-email-gateway status --json"))["windows"]
    assert [(window["limit"], window["seconds"]) for window in windows] == [(20, 60), (250, 3600)]
    mx.sh("chmod 600 /var/log/zulip/*.log")
    shown = mx.sh("zulip-email-gateway status")
    mx.sh("chmod 644 /var/log/zulip/*.log")
    assert "of 20 in 65 s" in shown and "No log of Zulip's worker can be read in /var/log/zulip" in shown


def test_values_reach_the_program_and_postfix(mx):
    conf = mx.sh("cat /etc/zulip-email-gateway/gateway.conf")
    values = (
        "auto_replies = post",
        "timeout = 10",
        "share = 9",
        "max_wait = 30",
        "max_mib = 1",
        "days = 2",
        "max_mails = 1000",
    )
    for line in (*values, "unknown_addresses = accept", "most_queued = 50"):
        assert f"\n{line}\n" in conf
    assert mx.sh("postconf -h message_size_limit zulip_time_limit").split() == ["1000000", "135"]


def test_the_hosts_own_programs_may_send_and_nobody_else(mx):
    script = "import smtplib; s = smtplib.SMTP('127.0.0.1'); s.ehlo(); s.mail('a@example.com'); print(s.rcpt('{}')[0])"
    assert mx.python(script.format("user@sender.example.org")).strip() == "250"
    [[_, code, text]] = mx.send("user@sender.example.org")["refused"]
    assert (code, "Relay access denied" in text) == (554, True)


@contextmanager
def relay(mx: ZulipHost) -> Iterator[Callable[[], str]]:
    """The relay host runs; the function waits for the next mail that it takes, and gives its line."""
    outside = testhosts.inside(f"{mx.prefix}-outside")
    script = (PROJECT / "molecule/alternative/tests/relay.py").read_text()
    process = subprocess.Popen((*outside, "timeout", "90", "python3", "-c", script), stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process.stdout.readline
    finally:
        testhosts.run(*outside, "pkill", "-f", "relay that wants TLS")


SEND = "printf 'Subject: x\n\nx\n' | sendmail user@elsewhere.example"
TAKEN = "zulip True user@elsewhere.example\n"


def test_mail_that_leaves_goes_through_the_relay_host(mx):
    """With its login, encrypted; and the password is nobody else's to read."""
    with relay(mx) as next_mail:
        mx.sh(SEND)
        assert next_mail() == TAKEN
    file = mx.host.file("/etc/postfix/relayhost_password")
    assert (file.mode, file.user) == (0o600, "root") and file.contains("s3cret: relay")
    assert "s3cret" not in mx.sh("cat /etc/postfix/main.cf") + mx.play("--check", "--diff", "-vvv").stdout


def test_a_relay_host_with_a_certificate_that_must_be_good(mx):
    """On port 465; the password goes to no one who only says that he is the relay host."""
    port_465 = {"postfix_localmail_relayhost": "[outside.example.com]:465", "postfix_localmail_relayhost_tls": "secure"}
    mx.sh("postsuper -d ALL")
    assert changed(mx.play(**port_465)) > 0
    try:
        with relay(mx) as next_mail:
            mx.sh(SEND)
            assert wait(lambda: "certificate not verified" in mx.sh("mailq"), 30), mx.sh("mailq")
            certificate = testhosts.enter(f"{mx.prefix}-outside", "cat /root/relay.crt")
            mx.host.run(
                "echo %s > /usr/local/share/ca-certificates/relay.crt; update-ca-certificates; postfix reload; sleep 1;"
                " postqueue -f",
                certificate,
            )
            assert next_mail() == TAKEN
    finally:
        mx.sh("rm -f /usr/local/share/ca-certificates/relay.crt; update-ca-certificates --fresh")
        mx.play()


def test_size_limit(mx):
    local = mx.address().partition("@")[0]
    [[_, code, _]] = mx.send(f"user+{local}@{DOMAIN}", size=1_100_000)["refused"]
    assert code == 552


def test_mail_of_the_hosts_own_programs_comes_to_its_users(mx, subject):
    mx.sh(f"printf 'Subject: {subject}\n\nfrom cron\n' | sendmail root")
    mx.sh(f"for i in $(seq 300); do grep -qs '{subject}' /var/mail/root && exit; sleep 0.2; done; mailq; exit 1")


def test_the_missing_mx_record_was_a_warning(mx):
    done = mx.play("--check")
    assert done.returncode == 0 and f"WARNING: The MX record of {DOMAIN} does not point at" in done.stdout
