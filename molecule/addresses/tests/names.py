"""Addresses besides Zulip's own, and who may write to them, for both generations of Zulip."""

from __future__ import annotations

import base64
import secrets
import subprocess
from pathlib import Path

import pytest
import testhosts
from conftest import ZulipHost, changed, wait
from figures import clean

MONITORING = "monitoring@sender.example.org"
NOT_LISTED = "5.7.1 <{}>: Recipient address rejected: only certain senders may write to this address"


def fresh(mx: ZulipHost) -> ZulipHost:
    clean(mx)
    mx.began = mx.sh("date +%s.%N").strip()
    return mx


def said(mx: ZulipHost) -> str:
    """What Postfix has logged since the test began."""
    return mx.sh(f"journalctl -o cat -u 'postfix*' --since=@{mx.began}")


MAILBOX = (Path(__file__).parent / "mailbox.py").read_text()


def sent_back(mx: ZulipHost, words: str) -> str:
    """The mail with these words that the senders' own server has got."""
    outside = testhosts.inside(f"{mx.prefix}-outside")
    # Both hosts' tests want it, and it goes with its host.
    start = 'systemd-run --quiet --unit mailbox python3 -c "$(cat)" 2>/dev/null || systemctl is-active mailbox'
    subprocess.run((*outside, "sh", "-c", start), input=MAILBOX, text=True, check=True, capture_output=True)
    look = ["grep", "-lrFe", words, "/root/mailbox"]

    def found() -> str:
        mx.sh("postqueue -f")  # it may not have been there yet
        done = subprocess.run((*outside, *look), capture_output=True, text=True, check=False)
        return done.stdout.split("\n")[0]

    name = wait(found, 30)
    assert name, mx.journal()
    return subprocess.run((*outside, "cat", name), capture_output=True, text=True, errors="replace", check=True).stdout


def token(mx: ZulipHost, channel: str) -> str:
    return next(row["token"] for row in mx.state()["channels"] if row["name"] == channel)


def test_an_alias_leads_to_its_channel(mx, subject):
    for number, domain in enumerate([mx.domain, mx.domain.upper(), mx.domain.replace("mail", "old")]):
        assert mx.send(f"help@{domain}", subject=f"{subject} {number}")["accepted"] == 1
    posted = mx.wait_for(subject, 3)
    assert {message["channel"] for message in posted} == {"support"}
    assert all(message["content"].startswith("**From:** user@sender.example.org") for message in posted)


def test_mail_for_a_former_mail_domain_comes_to_the_same_addresses(mx, subject):
    former = mx.domain.replace("mail", "old")
    assert mx.send(mx.address().replace(mx.domain, former), subject=subject)["accepted"] == 1
    mx.wait_for(subject)
    assert mx.send(mx.reply_address().replace(mx.domain, former), text=subject)["accepted"] == 1
    mx.wait_for("lunch")
    [[_, code, text]] = mx.send(f"nobody@{former}", subject=subject)["refused"]
    assert (code, "5.1.1" in text) == (550, True)
    [[_, code, text]] = mx.send(f"help@elsewhere.{mx.domain}", subject=subject)["refused"]
    assert (code, "Relay access denied" in text) == (554, True)


def test_an_alias_may_post_as_a_bot(mx, subject):
    assert mx.send(f"alerts@{mx.domain}", sender=MONITORING, subject=subject)["accepted"] == 1
    (posted,) = mx.wait_for(subject)
    assert (posted["channel"], posted["sender"]) == ("general", "alerts-bot@zulip.example.com")


@pytest.mark.parametrize(
    ("channel", "sender", "author"),
    [
        ("", "other@sender.example.org", MONITORING),
        ("", "", MONITORING),
        ("日本語", "user@example.net", "user@sender.example.org"),
    ],
)
def test_who_is_not_listed_is_rejected(mx, subject, channel, sender, author):
    to = mx.address(channel) if channel else f"alerts@{mx.domain}"
    [[_, code, text]] = mx.send(to, sender=sender, author=author, subject=subject)["refused"]
    assert (code, text) == (550, NOT_LISTED.format(to))


def test_the_author_has_to_be_listed_too(mx, subject):
    """Which is told before the mail is accepted, or else to whoever is given as its sender."""
    to = f"alerts@{mx.domain}"
    [[_, code, text]] = mx.send(to, sender=MONITORING, author="other@sender.example.org", subject=subject)["refused"]
    assert (code, text) == (550, "5.7.1 only certain senders may write to this address")
    mx.send(to, sender="a@example.net", author=f"Monitoring <{MONITORING}>", subject=f"{subject} good")
    assert [message["topic"] for message in mx.wait_for(subject)] == [f"{subject} good"]


def test_who_is_blocked_may_write_to_nobody_but_postmaster(mx, subject):
    for to in (f"help@{mx.domain}", mx.address(), mx.reply_address()):
        [[_, code, text]] = mx.send(to, sender="spam@sender.example.org", subject=subject)["refused"]
        assert (code, text.endswith("this sender is blocked here")) == (550, True)
    assert mx.send(f"postmaster@{mx.domain}", sender="spam@sender.example.org")["accepted"] == 1


def test_no_sender_learns_a_channels_address(mx, subject):
    """By a rejection, by a bounce or by what stands in it."""
    mx.in_zulip("INSERT INTO closed VALUES ('support', 'Not authorized')")
    try:
        answer = mx.send(f"help@{mx.domain}", subject=subject)
        # Zulip 11's mail server rejects it at RCPT already.
        bounce = sent_back(mx, subject) if answer["accepted"] else ""
    finally:
        mx.in_zulip("DELETE FROM closed")
    assert f"help@{mx.domain}" in bounce or answer["refused"]
    assert token(mx, "support")[:8] not in f"{answer} {bounce} {said(mx)}"


@pytest.mark.zulip(10)
def test_a_regenerated_address_delays_mail_until_the_next_run(mx, subject):
    mx.in_zulip(f"UPDATE channel SET token = '{secrets.token_hex(16)}' WHERE name = 'support'")
    [[_, code, text]] = mx.send(f"help@{mx.domain}", subject=subject)["refused"]
    assert code == 450 and "the alias help leads to an address that Zulip does not know any more" in text
    assert changed(mx.play()) > 0
    assert mx.send(f"help@{mx.domain}", subject=subject)["accepted"] == 1
    assert mx.wait_for(subject)[0]["channel"] == "support"


@pytest.mark.zulip(11)
def test_addresses_are_the_gateways_secret(mx):
    mode = mx.sh("stat -c '%a %U %G' /etc/zulip-email-gateway/addresses.json").strip()
    assert mode == "640 root zulip-email-gateway"
    done = mx.play("--check", "--diff", "-vv", email_gateway_aliases={"other": "#support"})
    assert done.returncode == 0 and "gateway.conf, the addresses and the credentials" in done.stdout
    assert not any(channel["token"] in done.stdout for channel in mx.state()["channels"])


@pytest.mark.zulip(11)
def test_switched_off_and_on_again(mx, subject):
    """From the start all in one run: Zulip tells no address before it knows its pattern."""
    assert changed(mx.play(zulip_puppet_classes="zulip::profile::standalone")) > 0
    assert mx.sh("ls -d /etc/zulip-email-gateway /etc/postfix/zulip_* 2>/dev/null || true") == ""
    assert changed(mx.play()) > 0
    assert mx.send(f"help@{mx.domain}", subject=subject)["accepted"] == 1
    mx.wait_for(subject)
    assert changed(mx.play()) == 0


@pytest.mark.zulip(10)
def test_doctor_lists_every_alias_and_whether_zulip_knows_it(mx):
    found = mx.host.run("zulip-email-gateway doctor").stdout
    assert f"ok     mail for help@{mx.domain} goes to #support\n" in found
    assert f"ok     mail for alerts@{mx.domain} goes to #general\n" in found
    before = token(mx, "support")
    mx.sh("rm -f /var/lib/zulip-email-gateway/journal.sqlite*; systemctl restart zulip-email-gateway")
    mx.in_zulip(f"UPDATE channel SET token = '{secrets.token_hex(16)}' WHERE name = 'support'")
    try:
        found = mx.host.run("zulip-email-gateway doctor").stdout
        words = "the alias help leads to an address that Zulip does not know any more; run playbooks/site.yml"
        assert f"WRONG  mail for help@{mx.domain} waits: {words}" in found, found
    finally:
        mx.in_zulip(f"UPDATE channel SET token = '{before}' WHERE name = 'support'")


JOERG = "jörg@sender.example.org"


def test_a_sender_whose_address_is_not_ascii(mx, subject):
    """RFC 6531, with a header in UTF-8 (RFC 6532); without SMTPUTF8 in it, too."""
    text = f"From: Jörg <{JOERG}>\r\nSubject: {subject} Größe\r\nMessage-ID: <1@x>\r\nDate: x\r\n\r\nHallo\r\n"
    raw = base64.b64encode(text.encode()).decode()
    answer = mx.send(f"help@{mx.domain}", mx.reply_address(), sender=JOERG, raw=raw)
    assert answer["accepted"] == 2, answer
    (posted,) = mx.wait_for(subject)
    assert posted["topic"] == f"{subject} Größe"
    assert posted["content"] == f"**From:** Jörg <{JOERG}>\nHallo", posted
    mx.wait_for("lunch")
    blank = base64.b64encode(text.replace("Hallo", "").replace(subject, f"{subject} blank").encode()).decode()
    assert mx.send(f"help@{mx.domain}", sender=JOERG, raw=blank)["accepted"] == 1
    bounce = sent_back(mx, f"{subject} blank")
    assert bounce.startswith(f"From <>, to ['{JOERG}'], ['SIZE=") and "SMTPUTF8" in bounce.split("\n")[0]
    assert "Zulip finds no text in it" in bounce and token(mx, "support")[:8] not in bounce
    assert f"help@{mx.domain}" in bounce
    [[_, code, told]] = mx.send(f"größe@{mx.domain}", sender=JOERG)["refused"]
    assert (code, "5.1.1" in told) == (550, True), told


@pytest.mark.zulip(10)
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


@pytest.mark.zulip(10)
def test_bad_variables(mx):
    texts = mx.refusals([variables for variables, _ in BAD])
    assert not {words: text for text, (_, words) in zip(texts, BAD, strict=True) if words not in text}


@pytest.mark.zulip(10)
def test_a_parameter_that_postfix_does_not_know_is_refused(mx):
    before = mx.sh("md5sum /etc/postfix/main.cf")
    done = mx.play(postfix_localmail_settings={"smtpd_hard_eror_limit": 5})
    assert done.returncode != 0 and "smtpd_hard_eror_limit" in done.stdout, done.stdout[-2000:]
    assert mx.sh("md5sum /etc/postfix/main.cf") == before
    assert mx.sh("postconf -h smtpd_hard_error_limit") == "15\n"


@pytest.mark.zulip(10)
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


@pytest.mark.zulip(11)
def test_zulips_own_sender_takes_bounces_and_nothing_else(mx, subject):
    mx.sh(f"sed -i '1i NOREPLY_EMAIL_ADDRESS = \"noreply@{mx.domain}\"' /etc/zulip/settings.py")
    try:
        assert changed(mx.play()) > 0
        to = f"noreply@{mx.domain}"
        assert mx.send(to, sender="", subject=subject)["accepted"] == 1
        assert mx.send(to, subject=subject, header="Auto-Submitted: auto-replied")["accepted"] == 1
        [[_, code, text]] = mx.send(to, subject=subject)["refused"]
        assert (code, "Zulip only sends from this address, and nobody reads what comes to it" in text) == (550, True)
        dropped = "a bounce or an automatic reply to Zulip's own sender address"
        assert wait(lambda: said(mx).count(dropped) == 2, 20), said(mx)
        assert mx.messages(subject) == []
    finally:
        mx.sh("sed -i '/^NOREPLY_EMAIL_ADDRESS/d' /etc/zulip/settings.py")
        assert changed(mx.play()) > 0


@pytest.mark.zulip(11)
def test_a_former_mail_domain_that_points_elsewhere_is_a_warning(mx):
    gone = "gone.example.net"
    former = [mx.domain.replace("mail", "old"), gone]
    done = mx.play("--check", email_gateway_former_mailnames=former)
    assert done.returncode == 0 and f"WARNING: The MX record of {gone} does not" in done.stdout, done.stdout[-3000:]
    done = mx.play(playbook="doctor", email_gateway_former_mailnames=former)
    assert f"warn   The MX record of {gone} does not" in done.stdout, done.stdout[-3000:]
    assert f"The MX record of {former[0]}" not in done.stdout
