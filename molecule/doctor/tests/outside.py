"""What only playbooks/doctor.yml sees: DNS, port 25 from elsewhere, what site.yml would change."""

from __future__ import annotations

import json
import re

import testhosts
from conftest import ZulipHost, changed


def asked(mx: ZulipHost, **variables: object) -> str:
    done = mx.play(playbook="doctor", **variables)
    assert ("Everything is right." in done.stdout) == (done.returncode == 0), done.stdout
    return done.stdout


def test_everything_is_right_from_outside(mx):
    done = mx.play(playbook="doctor")
    assert changed(done) == 0 and "Everything is right." in done.stdout
    assert "WRONG" not in done.stdout and '"warn ' not in done.stdout, done.stdout
    assert f'"ok     DNS: 1 {mx.fqdn}"' in done.stdout and '"ok     port 25 from outside"' in done.stdout


def test_for_programs(mx):
    done = mx.play(playbook="doctor", doctor_format="json")
    found = re.search(r'"msg": (\[\s*\{.*?\}\s*\])\n', done.stdout, re.DOTALL)
    findings = json.loads(found[1])
    assert done.returncode == 0 and {one["level"] for one in findings} == {"ok"} and len(findings) > 20
    assert {"level", "text", "remedy"} == set(findings[0])
    text = mx.play(playbook="doctor", doctor_format="xml").stdout
    assert 'doctor_format is \\"xml\\". Write text or json.' in text


def test_what_site_yml_would_complain_about_is_told_too(mx):
    told = asked(mx, email_gateway_mailname="nowhere.example.com")
    assert f"IN MX 1 {mx.fqdn}." in told and "WRONG  The MX record of nowhere.example.com" in told
    assert "Postfix runs" in told  # it goes on


def test_an_inventory_that_was_not_applied(mx):
    told = asked(mx, postfix_localmail_message_size_limit=1000000, email_gateway_most_queued=77)
    for path in ("/etc/postfix/main.cf", "/etc/zulip-email-gateway/gateway.conf"):
        assert f"WRONG  {path} is not what playbooks/site.yml would write; run it; with --check --diff" in told
    assert mx.sh("postconf -h message_size_limit").strip() != "1000000"


def test_port_25_is_closed(mx):
    mx.sh("ufw allow 22/tcp >/dev/null; ufw --force enable >/dev/null; ufw deny 25/tcp >/dev/null")
    try:
        assert "has rules for port 25" in asked(mx, doctor_other_mail_server="192.0.2.1")
    finally:
        mx.sh("ufw --force reset >/dev/null")


def test_an_address_without_a_name(mx):
    outside = f"{mx.prefix}-outside"
    records = "/etc/dnsmasq.d/zeg.conf"
    testhosts.enter(outside, f"cp {records} /root/; sed -i '/^ptr-record/d' {records}; systemctl restart dnsmasq")
    try:
        told = asked(mx)
        assert "has no name in DNS that leads back to it" in told and f"(PTR record) to {mx.fqdn}" in told
    finally:
        testhosts.enter(outside, f"cp /root/zeg.conf {records}; systemctl restart dnsmasq")


def test_a_gateway_that_is_not_there(mx):
    mx.sh("mv /usr/local/bin/zulip-email-gateway /root/")
    try:
        assert "WRONG  the gateway is not installed; run playbooks/site.yml" in asked(mx)
    finally:
        mx.sh("mv /root/zulip-email-gateway /usr/local/bin/")
