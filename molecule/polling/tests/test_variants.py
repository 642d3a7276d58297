"""STARTTLS, OAuth 2, Zulip's own polling, what the login says when it fails, and off."""

from __future__ import annotations

import re
import time

import pytest
from conftest import ZulipHost, changed, wait
from imap_inbox import POLL, Inbox

OAUTH = {
    "email_gateway_oauth_token_endpoint": "https://imap2.example.com:8443/token",
    "email_gateway_oauth_client_id": "zulip",
    "email_gateway_oauth_client_secret": "the client's secret",
}


@pytest.fixture
def mx(host) -> ZulipHost:
    return host("mx2")


@pytest.fixture
def inbox(mx, host) -> Inbox:
    one = Inbox(mx, host("imap2"))
    one.empty()
    return one


def test_starttls(mx, inbox, subject):
    assert "tls = starttls" in mx.sh("cat /etc/zulip-email-gateway/gateway.conf")
    inbox.append(subject)
    mx.wait_for(subject)


def test_folders_below_the_inbox(mx, inbox):
    """The folder for what cannot be posted goes where the server has room for folders."""
    inbox.append("a poison mail", to=inbox.user.replace("@", f"+general.{'0' * 31}1@"))
    assert wait(lambda: inbox.count("INBOX.Zulip-Failed") == 1, 20)
    assert inbox.count() == 0


def test_without_idle(mx, inbox, subject):
    """A server that has no IDLE is asked every 15 seconds."""
    conf = "/etc/dovecot/dovecot.conf"
    inbox.imap.sh(f"cp {conf} /root/; echo 'imap_capability = IMAP4rev1 UIDPLUS' >> {conf}")
    inbox.imap.sh("doveadm reload; doveadm kick zulip@imap2.example.com || true")
    try:
        time.sleep(3)
        began = inbox.append(subject)[0]
        (message,) = mx.wait_for(subject, seconds=40)
        assert message["at"] - began < 20
    finally:
        inbox.imap.sh(f"cp /root/dovecot.conf {conf}; doveadm reload; doveadm kick zulip@imap2.example.com || true")


ALIAS = {
    "email_gateway_aliases": {"help": {"to": "#support", "senders": ["@example.org"]}},
    "email_gateway_zulip_api_email": "admin@zulip.example.com",
    "email_gateway_zulip_api_key": "api-key-of-admin",
}


def test_an_alias(mx, inbox, subject):
    """Who is not in its list is told by nobody: an inbox has no envelope. His mail is set aside."""
    to, before = inbox.user.replace("@", "+help@"), inbox.count("INBOX.Zulip-Failed")
    assert changed(mx.play(**ALIAS)) > 0
    inbox.append(subject, to=to)
    assert mx.wait_for(subject)[0]["channel"] == "support"
    inbox.put([f"From: user@example.net\r\nTo: {to}\r\nSubject: {subject} other\r\n\r\nHello\r\n"])
    assert wait(lambda: inbox.count("INBOX.Zulip-Failed") == before + 1, 20)
    assert len(mx.messages(subject)) == 1


def refusal_of_log_in(mx: ZulipHost, **variables: object) -> str:
    """What site.yml says; Zulip's settings and the gateway's stay as they are."""
    state = "md5sum /etc/zulip/* /etc/zulip-email-gateway/*; cat /var/lib/zulip-standin/restarts | wc -l"
    before = mx.sh(state)
    done = mx.play(**variables)
    assert done.returncode != 0
    assert mx.sh(state) == before
    return " ".join(done.stdout.partition("Check that the login succeeded")[2].split())


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        (
            {"email_gateway_password": "wrong"},
            "refuses the password (email_gateway_password) of zulip@imap2.example.com",
        ),
        ({"email_gateway_imap_folder": "Nowhere"}, "has no folder 'Nowhere' for zulip@imap2.example.com"),
        ({"email_gateway_imap_server": "outside.example.com"}, "cannot connect to outside.example.com:143"),
        ({**OAUTH, "email_gateway_oauth_client_secret": "wrong"}, "answers 401 invalid_client"),
        ({**OAUTH, "email_gateway_oauth_refresh_token": "unknown"}, "answers 400 invalid_grant"),
    ],
)
def test_why_the_log_in_failed(mx, inbox, variables, words):
    inbox.forgive()
    assert words in refusal_of_log_in(mx, **variables)


def test_an_untrusted_certificate_is_refused(mx):
    ca = "/usr/local/share/ca-certificates/imap.crt"
    mx.sh(f"mv {ca} /root/; update-ca-certificates --fresh")
    try:
        assert "the certificate of imap2.example.com:143 is not trusted" in refusal_of_log_in(mx)
    finally:
        mx.sh(f"mv /root/imap.crt {ca}; update-ca-certificates")


def test_oauth_2_renews_its_tokens(mx, inbox, subject):
    """A refresh token that is good for one use, access tokens for seconds."""
    secret = "the first refresh token"
    variables = {**OAUTH, "email_gateway_oauth_refresh_token": secret, "email_gateway_oauth_scope": "mail"}
    inbox.imap.sh("echo 4 > /run/token-seconds")
    done = mx.play("-vvv", "--diff", **variables)
    assert changed(done) > 0
    # Ansible itself shows what stands on its own command line.
    shown = done.stdout.partition("TASK [")[2]
    assert not [one for one in (secret, OAUTH["email_gateway_oauth_client_secret"]) if one in shown]
    inbox.append(f"{subject} 1")
    mx.wait_for(f"{subject} 1", seconds=20)
    time.sleep(5)
    inbox.imap.sh("doveadm kick zulip@imap2.example.com || true")
    inbox.append(f"{subject} 2")
    mx.wait_for(f"{subject} 2", seconds=30)
    assert int(inbox.imap.sh("grep -c '^refresh_token mail$' /var/log/tokens.log")) >= 3
    mx.sh(f"systemctl restart {POLL}")  # the token that is kept is the one that serves
    inbox.append(f"{subject} 3")
    mx.wait_for(f"{subject} 3", seconds=30)
    assert changed(mx.play(**variables)) == 0


def test_oauth_2_with_the_clients_own_credentials(mx, inbox, subject):
    """And another folder than the default."""
    inbox.imap.sh("rm -f /run/token-seconds")
    inbox.imap.sh(f"doveadm mailbox create -u {inbox.user} INBOX.Zulip")
    assert changed(mx.play(**OAUTH, email_gateway_imap_folder="INBOX.Zulip", email_gateway_imap_port=143)) > 0
    inbox.append(subject, folder="INBOX.Zulip")
    mx.wait_for(subject, seconds=20)


def test_a_consent_in_a_browser(mx, inbox, subject):
    """With a public client, which has no secret: site.yml says how, and only the host has the refresh token."""
    public = {**OAUTH, "email_gateway_oauth_client_id": "public", "email_gateway_oauth_client_secret": ""}
    public["email_gateway_oauth_scope"] = "mail offline_access"
    words = refusal_of_log_in(mx, **public)
    command = re.search(r"sudo (zulip-email-gateway oauth [^;]*) DEVICE-ENDPOINT", words)
    assert command, words
    inbox.imap.sh("rm -f /run/consent; (sleep 3; touch /run/consent) > /dev/null 2>&1 &")
    said = mx.sh(f"{command[1]} https://imap2.example.com:8443/device")
    assert "Open https://imap2.example.com:8443/consent in a browser" in said and "ABCD-EFGH" in said
    assert changed(mx.play(**public)) > 0
    inbox.append(subject)
    mx.wait_for(subject, seconds=20)
    mx.sh(f"systemctl restart {POLL}")
    inbox.append(f"{subject} again")
    mx.wait_for(f"{subject} again", seconds=20)


def test_doctor_logs_in(mx):
    assert mx.play().returncode == 0
    shown = mx.play(playbook="doctor").stdout
    assert "Everything is right." in shown, shown
    assert "logged in to imap2.example.com" in shown and "DNS: " not in shown
    assert re.search(r"ok     the inbox was last read at 20\d\d-", shown)
    metrics = mx.sh("zulip-email-gateway status --prometheus")
    [at] = re.findall(r"^zulip_email_gateway_last_poll_timestamp_seconds ([\d.]+)$", metrics, re.MULTILINE)
    assert abs(time.time() - float(at)) < 900


def test_from_polling_to_local_delivery_and_back(mx, inbox, subject):
    """Never without either: a login that fails leaves the way there was."""
    local = {
        "zulip_puppet_classes": "zulip::profile::standalone, zulip::postfix_localmail",
        "email_gateway_login": None,
        "email_gateway_mailname": mx.domain,
    }
    assert changed(mx.play(**local)) > 0
    assert mx.host.run(f"systemctl is-active {POLL}").rc != 0
    failed = mx.play(email_gateway_password="wrong")
    assert failed.returncode != 0 and "refuses the password" in failed.stdout
    inbox.forgive()
    assert mx.send(mx.address(), subject=f"{subject} local")["accepted"] == 1
    mx.wait_for(f"{subject} local")
    assert changed(mx.play()) > 0
    assert not mx.host.socket("tcp://0.0.0.0:25").is_listening
    inbox.append(f"{subject} polled")
    mx.wait_for(f"{subject} polled")


SECRETS = "/etc/zulip/zulip-secrets.conf"
ZULIP = {"email_gateway_polling_engine": "zulip", "email_gateway_imap_tls": "implicit"}


def test_zulips_own_polling(mx, inbox, subject):
    mx.sh(f"echo 'email_gateway_password = a former one' >> {SECRETS}")
    inbox.append(f"{subject} trial")
    assert changed(mx.play(**ZULIP)) > 0
    assert f"email_gateway_password = {inbox.password}\n" in mx.sh(f"cat {SECRETS}")
    mx.wait_for(f"{subject} trial", seconds=5)  # the trial run has taken it
    assert mx.host.run(f"systemctl is-active {POLL}").rc != 0
    (line,) = [line for line in mx.sh("cat /etc/cron.d/email-mirror").splitlines() if not line.startswith("#")]
    assert line == "* * * * * zulip cd /home/zulip/deployments/current && ./manage.py email_mirror"
    inbox.append(subject)
    mx.wait_for(subject, seconds=75)  # cron runs it every minute
    assert changed(mx.play(**ZULIP)) == 0


def test_zulips_own_polling_and_its_failure_is_shown(mx):
    mx.sh("rm /etc/cron.d/email-mirror; mv /opt/zulip-standin/email_mirror.py /root/")
    try:
        done = mx.play(**ZULIP)
        assert done.returncode != 0 and "No module named 'email_mirror'" in done.stdout
    finally:
        mx.sh("mv /root/email_mirror.py /opt/zulip-standin/")


@pytest.mark.parametrize("more", [OAUTH, {"email_gateway_former_mailnames": ["old.example.com"]}])
def test_what_zulips_own_polling_can_not_do_is_refused(mx, more):
    text = mx.refusal(**{**ZULIP, **more})
    assert "email_gateway_polling_engine is zulip" in text and "Set email_gateway_polling_engine: idle" in text


def test_missing_values_are_named(mx):
    text = mx.refusal(email_gateway_imap_server="")
    assert "is missing: email_gateway_imap_server, the name of the IMAP server" in text
    text = mx.refusal(email_gateway_pattern="%s@Example")
    assert 'email_gateway_pattern is "%s@Example"' in text and '"username+%s@example.com"' in text


def test_switched_off_everything_goes(mx, inbox):
    assert changed(mx.play(email_gateway_login=None)) > 0
    assert mx.pattern() == ""
    secrets = mx.sh(f"cat {SECRETS}")
    assert secrets.count("email_gateway_password") == 1 and "email_gateway_password = a former one\n" in secrets
    assert "shared_secret" in secrets
    assert mx.host.run("id zulip-email-gateway").rc != 0
    assert not mx.host.package("python3-imap-tools").is_installed
    folders = "/etc /var/lib /usr/local/bin /usr/local/lib /etc/systemd/system"
    assert mx.sh(f"find {folders} -maxdepth 1 -name 'zulip-email-gateway*'; ls /etc/cron.d | grep mirror || true") == ""
    assert changed(mx.play(email_gateway_login=None)) == 0
