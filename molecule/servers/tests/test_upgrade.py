"""The system is upgraded under the gateway, from Debian 12 to 13."""

from __future__ import annotations

import re

import pytest
import testhosts
from conftest import ZulipHost, changed, wait

# What an operator types, but only as far as the gateway is concerned: Python, systemd, Postfix and what they need.
UPGRADE = """
sed -i 's/bookworm/trixie/g' $(grep -rl bookworm /etc/apt/sources.list*)
export DEBIAN_FRONTEND=noninteractive
apt-get update --quiet
apt-get install --yes --quiet -o Dpkg::Options::=--force-confold base-files python3 postfix systemd
"""


@pytest.fixture
def mx(host) -> ZulipHost:
    return host("mx44")


def test_mail_keeps_flowing(mx, subject):
    """Without the reboot that ends the upgrade, and after it; a certificate renewed meanwhile does no harm."""
    assert changed(mx.play()) > 0
    mx.send(mx.address(), subject=f"{subject} before")
    mx.wait_for(f"{subject} before")
    mx.sh(f"set -e\n{UPGRADE}")
    assert mx.sh(". /etc/os-release; echo $VERSION_ID").strip() == "13"
    sent = mx.send(mx.address(), subject=f"{subject} between")
    assert sent["accepted"] == 1
    # While it is still being stopped the former one would be asked.
    new = '[ "$(systemctl is-active postfix@-)" = inactive ] && postfix status && postqueue -f'
    assert wait(lambda: mx.host.run(new).rc == 0, 60)
    mx.wait_for(f"{subject} between", seconds=60)
    assert "3.10" in mx.sh("journalctl -u 'postfix*' | grep 'daemon started' | tail -1")
    mx.sh("systemctl reload postfix")
    mx.send(mx.address(), subject=f"{subject} reloaded")
    mx.wait_for(f"{subject} reloaded", seconds=60)
    testhosts.restart(mx.prefix, "mx44")
    mx.send(mx.address(), subject=f"{subject} after")
    mx.wait_for(f"{subject} after", seconds=60)


def test_doctor_says_that_site_yml_should_run(mx):
    words = "WRONG  the system was upgraded from Debian 12 to Debian 13 since playbooks/site.yml ran; run playbooks/"
    assert words in mx.play(playbook="doctor").stdout


def test_site_yml_brings_all_up_to_date(mx, subject):
    done = mx.play("--diff")
    assert changed(done) > 0
    assert re.search(r"\+system = Debian 13", done.stdout), done.stdout[-3000:]
    assert (
        mx.sh("ls /usr/local/lib/zulip-email-gateway/email_gateway/__pycache__ | grep -vc cpython-313 || true") == "0\n"
    )
    assert changed(mx.play()) == 0
    assert "Everything is right" in mx.play(playbook="doctor").stdout
    mx.send(mx.address(), subject=subject)
    mx.wait_for(subject)


def test_switched_off_afterwards(mx):
    assert changed(mx.play(zulip_puppet_classes="zulip::profile::standalone")) > 0
    assert not mx.host.socket("tcp://0.0.0.0:25").is_listening
    assert mx.sh("ls /etc/systemd/system | grep -c zulip-email-gateway || true").strip() == "0"
