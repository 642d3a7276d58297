"""Zulip in a container: here another host plays it, and systemd-socket-proxyd the published port."""

from __future__ import annotations

import pytest
from conftest import ZulipHost, changed

PUBLISH = """
cat > /etc/systemd/system/published.socket <<'EOF'
[Socket]
ListenStream=127.0.0.1:2525
EOF
cat > /etc/systemd/system/published.service <<'EOF'
[Service]
ExecStart=/usr/lib/systemd/systemd-socket-proxyd image.example.com:25
EOF
systemctl daemon-reload; systemctl start published.socket
"""
# What the image does with SETTING_EMAIL_GATEWAY_PATTERN, and that it runs Zulip's own mail server.
IMAGE = """
sed -i 's/^puppet_classes = .*/&, zulip::local_mailserver/' /etc/zulip/zulip.conf
echo 'EMAIL_GATEWAY_PATTERN = "%s@docker.mail.example.com"' >> /etc/zulip/settings.py
/home/zulip/deployments/current/scripts/zulip-puppet-apply -f
systemctl restart zulip-worker
"""


@pytest.fixture
def mx(host) -> ZulipHost:
    return host("docker")


def test_it_is_named_where_nothing_is_set(mx):
    text = mx.refusal(email_gateway_zulip_server="")
    assert (
        "there is no Zulip on this host" in text and "127.0.0.1:2525 for a container's port 25 published there" in text
    )


def test_it_is_named_where_nothing_is_published(mx):
    text = mx.refusal()
    assert "Nothing answers as Zulip's mail server at 127.0.0.1:2525" in text
    assert "SETTING_EMAIL_GATEWAY_PATTERN=%s@docker.mail.example.com" in text


def test_mail_into_the_container(mx, host, subject):
    image = host("image")
    image.sh(IMAGE)
    mx.sh(PUBLISH)
    assert changed(mx.play()) >= 0
    assert changed(mx.play()) == 0
    local = image.address().partition("@")[0]
    assert mx.send(f"{local}@{mx.domain}", subject=subject)["accepted"] == 1
    image.wait_for(subject)
    told = mx.play(playbook="doctor")
    assert told.returncode == 0, told.stdout[-3000:]
    assert "ok     Zulip runs elsewhere: that it has accepted a mail is all that is known here" in told.stdout
    assert "ok     Zulip on its own host or in a container" in told.stdout


def test_a_container_that_is_stopped(mx):
    """The hint fits: there is no supervisorctl and no unit of ours to look at."""
    mx.sh("systemctl stop published.socket published.service")
    try:
        told = mx.host.run("zulip-email-gateway doctor").stdout
        assert "look at Zulip's container (does it run, and is its port 25 published there?)" in told
        assert "zulip-email-gateway-server" not in told
    finally:
        mx.sh("systemctl start published.socket")


def test_a_pattern_that_the_image_was_not_given(mx, host):
    """The message names the image's variable; the mail would wait."""
    image = host("image")
    set_to = "sed -i 's/{}.mail/{}.mail/' /etc/zulip/settings.py; systemctl restart zulip-email-mirror; sleep 2"
    image.sh(set_to.format("docker", "other"))
    try:
        told = mx.host.run("zulip-email-gateway doctor").stdout
        assert "Zulip's EMAIL_GATEWAY_PATTERN is not the gateway's" in told and "SETTING_EMAIL_GATEWAY_PATTERN" in told
    finally:
        image.sh(set_to.format("other", "docker"))
