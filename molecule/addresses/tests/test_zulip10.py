"""Addresses in front of Zulip 10."""

from __future__ import annotations

import pytest
from conftest import ZulipHost, changed
from forged import *  # noqa: F403
from names import *  # noqa: F403
from names import fresh


@pytest.fixture
def mx(host) -> ZulipHost:
    return fresh(host("mx1"))


# What is the same for both generations.


def test_zulips_api_at_a_url_of_its_own_needs_a_good_certificate(mx):
    url = {"email_gateway_zulip_api_url": "https://zulip.example.com"}
    mx.sh("""cp /etc/hosts /root/hosts; echo 127.0.0.1 zulip.example.com >> /etc/hosts
        openssl req -x509 -newkey rsa:2048 -nodes -days 9 -subj /CN=zulip.example.com -keyout /root/key.pem \
            -addext subjectAltName=DNS:zulip.example.com -out /usr/local/share/ca-certificates/zulip.crt 2>/dev/null
        cat > /etc/nginx/sites-enabled/zulips-api <<S
server { listen 443 ssl; server_name zulip.example.com; ssl_certificate_key /root/key.pem;
    ssl_certificate /usr/local/share/ca-certificates/zulip.crt;
    location / { proxy_pass http://unix:/run/zulip-web/socket; proxy_set_header Host \\$http_host; } }
S
        systemctl reload nginx""")
    try:
        assert "the certificate of https://zulip.example.com is not good: self-signed" in mx.refusal(**url)
        mx.sh("update-ca-certificates")
        assert changed(mx.play(**url)) == 0
    finally:
        mx.sh("""cp /root/hosts /etc/hosts
            rm /etc/nginx/sites-enabled/zulips-api /usr/local/share/ca-certificates/zulip.crt
            systemctl reload nginx; update-ca-certificates --fresh""")


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"email_gateway_aliases": {"postmaster": "#support"}}, "email_gateway_aliases: postmaster is reserved"),
        (
            {"email_gateway_aliases": {"a": "#nowhere"}},
            "email_gateway_aliases: a: Zulip's API answers 400 \"Invalid channel name 'nowhere'\" to admin@zulip",
        ),
        ({"email_gateway_zulip_api_key": "wrong"}, 'Zulip\'s API answers 401 "Invalid API key" to admin@'),
        ({"email_gateway_former_mailnames": ["x"]}, 'email_gateway_former_mailnames has "x"; write a mail domain'),
        ({"email_gateway_blocked_senders": ["x"]}, 'email_gateway_blocked_senders has "x"; write "user@'),
        ({"postfix_localmail_settings": {"mynetworks": "0.0.0.0/0"}}, "would relay mail for others"),
        ({"postfix_localmail_settings": {"relayhost": "x"}}, 'has "relayhost". The gateway sets it itself'),
        ({"postfix_localmail_settings": {"a b": "x"}}, 'has "a b". That is no parameter'),
        ({"postfix_localmail_settings": {"a": "x\nmynetworks = x"}}, 'has "a". That is no parameter'),
    ],
)
def test_bad_input_changes_nothing(mx, variables, words):
    assert words in mx.refusal(**variables)


def test_a_parameter_that_postfix_does_not_know_is_refused(mx):
    before = mx.sh("md5sum /etc/postfix/main.cf")
    done = mx.play(postfix_localmail_settings={"smtpd_hard_eror_limit": 5})
    assert done.returncode != 0 and "smtpd_hard_eror_limit" in done.stdout, done.stdout[-2000:]
    assert mx.sh("md5sum /etc/postfix/main.cf") == before
    assert mx.sh("postconf -h smtpd_hard_error_limit") == "15\n"
