"""Addresses in front of Zulip 10."""

from __future__ import annotations

import base64

import pytest
from conftest import ZulipHost, changed
from forged import *  # noqa: F403
from forged import WARNING, content, forged, mark
from names import *  # noqa: F403
from names import fresh


@pytest.fixture
def mx(host) -> ZulipHost:
    return fresh(host("mx1"))


# What is the same for both generations, as are some tests of the other file.


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


# Variables, and what the message has to say.
BAD: list[tuple[dict[str, object], str]] = [
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
]


def test_bad_variables(mx):
    texts = mx.refusals([variables for variables, _ in BAD])
    assert not {words: text for text, (_, words) in zip(texts, BAD, strict=True) if words not in text}


def test_a_parameter_that_postfix_does_not_know_is_refused(mx):
    before = mx.sh("md5sum /etc/postfix/main.cf")
    done = mx.play(postfix_localmail_settings={"smtpd_hard_eror_limit": 5})
    assert done.returncode != 0 and "smtpd_hard_eror_limit" in done.stdout, done.stdout[-2000:]
    assert mx.sh("md5sum /etc/postfix/main.cf") == before
    assert mx.sh("postconf -h smtpd_hard_error_limit") == "15\n"


def test_one_alias_for_each_channel(mx, subject):
    try:
        done = mx.play(email_gateway_aliases="channels")
        assert changed(done) > 0 and "#日本語 has no alias" in done.stdout
        assert mx.send(f"support@{mx.domain}", f"general@{mx.domain}", subject=subject)["accepted"] == 2
        assert {message["channel"] for message in mx.wait_for(subject, 2)} == {"support", "general"}
        [[_, code, _]] = mx.send(f"help@{mx.domain}", subject=subject)["refused"]
        assert code == 550
    finally:
        assert changed(mx.play()) > 0


def test_marked_only(mx, subject):
    """Mail of all kinds of text: Zulip reads the first plain one, or HTML."""
    html = "<html><head><style>p {display: none}</style></head><body>Hello <b>you</b></body></html>"
    bodies = {
        "base64": f"Content-Transfer-Encoding: base64\r\n\r\n{base64.b64encode('Grüße'.encode()).decode()}\r\n",
        "html": f"Content-Type: text/html\r\n\r\n{html}\r\n",
    }
    try:
        assert mark(mx)
        for name, body in bodies.items():
            mail = f"From: user@reject.example\r\nSubject: {subject} {name}\r\n"
            kind = "" if "Content-Type" in body else "Content-Type: text/plain; charset=utf-8\r\n"
            raw = base64.b64encode(f"{mail}{kind}{body}".encode()).decode()
            assert forged(mx, "reject.example", mx.address(), "", raw=raw)["accepted"] == 1
            posted = content(mx, f"{subject} {name}")
            assert WARNING.format("reject.example").strip("*") in posted, posted
            assert ("Grüße" if name == "base64" else "Hello you") in posted, posted
    finally:
        assert changed(mx.play()) > 0
