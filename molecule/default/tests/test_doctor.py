"""The doctor sees what is wrong, names the remedy, and changes nothing."""

from __future__ import annotations

import pytest
from conftest import ZulipHost, changed
from figures import JOURNAL, SOCKETS


@pytest.fixture
def mx(host) -> ZulipHost:
    return host("mx12")


def test_everything_is_right(mx):
    done = mx.play(playbook="doctor")
    assert changed(done) == 0 and "Everything is right." in done.stdout
    for words in (
        "Postfix runs",
        "port 25 greets with",
        "Zulip takes mail at",
        "the certificate",
        "mails since",
    ):
        assert words in done.stdout
    assert "WRONG" not in done.stdout


TROUBLE = {
    "Postfix does not run": ("systemctl stop postfix", "systemctl start postfix"),
    "nothing listens on 127.0.0.1:443": ("systemctl stop nginx", "systemctl start nginx"),
    "has another shared secret than the gateway; run playbooks/site.yml": (
        "sed -i.before 's/^shared_secret = ..../shared_secret = 0000/' /etc/zulip/zulip-secrets.conf",
        "mv /etc/zulip/zulip-secrets.conf.before /etc/zulip/zulip-secrets.conf",
    ),
    "Zulip's next upgrade takes the mail system over": (
        "sed -i.before 's/^puppet_classes.*/&, zulip::postfix_localmail/' /etc/zulip/zulip.conf",
        "mv /etc/zulip/zulip.conf.before /etc/zulip/zulip.conf",
    ),
    "zulip-email-gateway.socket does not run": (
        f"systemctl stop {SOCKETS} zulip-email-gateway.service",
        f"systemctl start {SOCKETS} zulip-email-gateway.service",
    ),
    "the service cannot be reached at /run/zulip-email-gateway/submit": (
        f"systemctl stop {SOCKETS} zulip-email-gateway.service",
        f"systemctl start {SOCKETS} zulip-email-gateway.service",
    ),
    "the journal was damaged and began anew": (
        f"systemctl stop zulip-email-gateway; cp -p {JOURNAL} /root/; echo garbage > {JOURNAL}; "
        "systemctl start zulip-email-gateway; sleep 1; zulip-email-gateway check || true",
        f"systemctl stop zulip-email-gateway.service; rm {JOURNAL}*; mv /root/journal.sqlite {JOURNAL}; "
        "systemctl start zulip-email-gateway.service",
    ),
    "cannot read /var/log/zulip/workers.log": (
        "setfacl -x u:zulip-email-gateway /var/log/zulip",
        "setfacl -m u:zulip-email-gateway:x /var/log/zulip",
    ),
    "journal.sqlite is not zulip-email-gateway's: all mail waits": (
        f"chown root {JOURNAL}",
        f"chown zulip-email-gateway {JOURNAL}",
    ),
    "systemctl status zulip-email-gateway-policy.socket": (
        "chgrp root /run/zulip-email-gateway.policy; postfix reload 2>/dev/null; sleep 1",
        "chgrp postfix /run/zulip-email-gateway.policy",
    ),
    "postfix check:": ("mv /etc/postfix/master.cf /root/", "mv /root/master.cf /etc/postfix/"),
    "cannot use /etc/zulip-email-gateway/gateway.conf": (
        "sed -i.before 's/^\\[zulip\\]/[zulip/' /etc/zulip-email-gateway/gateway.conf",
        "mv /etc/zulip-email-gateway/gateway.conf.before /etc/zulip-email-gateway/gateway.conf",
    ),
}


@pytest.mark.parametrize("words", TROUBLE)
def test_trouble_is_named(mx, words):
    spoil, mend = TROUBLE[words]
    mx.sh(spoil)
    try:
        done = mx.host.run("zulip-email-gateway doctor")
        assert done.rc != 0
        assert words in done.stdout + done.stderr
    finally:
        mx.sh(mend)


def test_what_site_yml_would_complain_about_is_told_too(mx):
    done = mx.play(playbook="doctor", email_gateway_mailname="nowhere.example.com")
    assert done.returncode != 0 and "IN MX 1 mx12.example.com." in done.stdout
    assert "Postfix runs" in done.stdout  # it goes on
