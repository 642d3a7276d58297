"""Found by looking: the upgrade from 10, and a mail host without Zulip."""

from __future__ import annotations

import pytest
from conftest import ZulipHost, changed, wait


@pytest.fixture
def mx(host) -> ZulipHost:
    return host("mx2")


@pytest.fixture
def relay(host) -> ZulipHost:
    return host("relay")


def test_upgrade_from_10_with_mail_in_the_queue(mx, subject):
    mx.send(mx.address(), subject=f"{subject} before")
    mx.wait_for(f"{subject} before")
    assert "url = https://127.0.0.1" in mx.sh("cat /etc/zulip-email-gateway/gateway.conf")
    mx.sh("systemctl stop zulip-web")
    mx.send(mx.address(), subject=subject, count=20)
    assert wait(lambda: "HTTP 502" in mx.sh("mailq"), 20)
    mx.sh("sh /opt/zulip-standin/upgrade 11.4; postqueue -f")
    # Until site.yml has run: it waits, and the reason names the remedy.
    words = "was Zulip upgraded to 11, or is the URL wrong? Run playbooks/site.yml"
    assert wait(lambda: words in " ".join(mx.sh("mailq").split()), 30), mx.sh("mailq")
    doctor = mx.play(playbook="doctor")
    assert doctor.returncode != 0 and "Run playbooks/site.yml" in doctor.stdout
    assert changed(mx.play()) > 0
    assert changed(mx.play(playbook="doctor")) == 0
    assert "url = smtp://127.0.0.1:10525" in mx.sh("cat /etc/zulip-email-gateway/gateway.conf")
    assert wait(lambda: mx.sh("postqueue -f") or len(mx.messages(subject)) >= 21, 60), mx.journal()
    assert len({message["topic"] for message in mx.messages(subject)}) == 21
    assert changed(mx.play()) == 0


def test_switched_off_on_11(mx):
    """After the upgrade; Zulip's own server was never on here, so it stays off."""
    assert changed(mx.play(zulip_puppet_classes="zulip::profile::standalone")) > 0
    assert not mx.host.socket("tcp://0.0.0.0:25").is_listening
    assert not mx.host.socket("tcp://127.0.0.1:10525").is_listening
    assert mx.sh("ls /etc/systemd/system | grep -c zulip-email-gateway || true").strip() == "0"


def test_a_mail_host_that_is_not_the_zulip_host(relay, host, subject):
    zulip = host("zulip")
    local = zulip.address().partition("@")[0]
    assert relay.send(f"{local}@{relay.domain}", subject=subject)["accepted"] == 1
    zulip.wait_for(subject)
    assert not relay.host.file("/etc/zulip").exists
    assert "smtp://zulip.example.com:25" in relay.sh("zulip-email-gateway check")
    # Zulip's log is out of reach: that Zulip has accepted a mail is all there is to tell.
    shown = relay.host.run("zulip-email-gateway status; zulip-email-gateway doctor").stdout
    assert "(accepted " in shown and "whether mail was posted is not known here" in shown
    assert "ok     Zulip runs elsewhere: that it has accepted a mail is all that is known here" in shown


def test_starttls_with_debians_certificate_where_zulips_is_not(relay):
    shown = relay.sh(
        "openssl s_client -starttls smtp -connect 127.0.0.1:25 </dev/null 2>/dev/null | openssl x509 -noout -serial"
    )
    assert shown == relay.sh("openssl x509 -noout -serial -in /etc/ssl/certs/ssl-cert-snakeoil.pem")


def test_across_a_network_it_is_encrypted(relay, host, subject):
    zulip = host("zulip")
    before = zulip.sh("cat /var/log/zulip/email_server.log").count("TLS: True")
    local = zulip.address().partition("@")[0]
    relay.send(f"{local}@{relay.domain}", subject=subject)
    zulip.wait_for(subject)
    assert zulip.sh("cat /var/log/zulip/email_server.log").count("TLS: True") > before


def test_zulip_elsewhere_and_none_answers(relay):
    text = relay.refusal(email_gateway_zulip_server="outside.example.com:25")
    assert "Nothing answers as Zulip's mail server at outside.example.com:25" in text
    assert "HOST:PORT" in relay.refusal(email_gateway_zulip_server="zulip.example.com")


def test_zulip_elsewhere_is_refused_where_zulip_is(host):
    text = host("mx1").refusal(email_gateway_zulip_server="zulip.example.com:25")
    assert "this host has Zulip 11" in text and "remove email_gateway_zulip_server" in text
