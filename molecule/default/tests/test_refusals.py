"""Bad input gets one message that says what to write, and nothing is changed."""

from __future__ import annotations

import pytest
from conftest import changed
from figures import ZULIP_DOWN, Fault, broken

ZULIP_CONF = "/etc/zulip/zulip.conf"


@pytest.fixture
def mx(host):
    return host("mx12")


def pattern(text: str) -> tuple[dict[str, object], list[str]]:
    return {"email_gateway_pattern": text}, [f'email_gateway_pattern is "{text}"', '"%s@mx12.mail.example.com"']


def classes(text: str, odd: str) -> tuple[dict[str, object], list[str]]:
    """A slip in the classes does not switch off."""
    return {"zulip_puppet_classes": text}, [f'zulip_puppet_classes is "{text}", of which "{odd}" is no class']


# Variables, and what the message has to say.
BAD: list[tuple[dict[str, object], list[str]]] = [
    (
        {"email_gateway_mailname": "nowhere.example.com"},
        ['"nowhere.example.com. IN MX 1 mx12.example.com."', "email_gateway_mx_check: warn"],
    ),
    (
        {"email_gateway_mailname": "localhost"},
        ['The mail domain is "localhost"', "Set email_gateway_mailname: emaildomain.example.com"],
    ),
    pattern("mx12.mail.example.com"),
    pattern("%s@other.example.com"),
    pattern("User+%s@mx12.mail.example.com"),
    (
        {"zulip_puppet_classes": ["zulip::postfix_localmail"]},
        ["zulip_puppet_classes is ['zulip::postfix_localmail'], which is no string"],
    ),
    classes("zulip::profile::standalone, zulip::postfix_localmial", "zulip::postfix_localmial"),
    classes(
        "zulip::profile::standalone zulip::postfix_localmail", "zulip::profile::standalone zulip::postfix_localmail"
    ),
    classes("", ""),
    (
        {"postfix_localmail_message_size_limit": -5},
        ["postfix_localmail_message_size_limit is -5. Write a number of bytes from 65536"],
    ),
    ({"postfix_localmail_client_mails": 0}, ["postfix_localmail_client_mails 0. Write numbers above 0"]),
    (
        {"postfix_localmail_client_exceptions": ["192.0.2.7", "192.0.2.7/24"]},
        ['postfix_localmail_client_exceptions is ["192.0.2.7", "192.0.2.7/24"]: 192.0.2.7/24 has host bits set. Write'],
    ),
    (
        {"email_gateway_login": "zulip@imap.example.com"},
        ["zulip_puppet_classes", "email_gateway_login (zulip@imap.example.com)"],
    ),
    ({"email_gateway_rate_limit_slack": 0}, ["email_gateway_rate_limit_slack is 0. Write a number above 0."]),
    (
        {"email_gateway_rate_limit_windows": ["50 in 60"]},
        ['email_gateway_rate_limit_windows is ["50 in 60"]. Write it as ["50/60", "120/300"]'],
    ),
]


def test_bad_variables(mx):
    texts = mx.refusals([variables for variables, _ in BAD])
    missing = {word: text for text, (_, words) in zip(texts, BAD, strict=True) for word in words if word not in text}
    assert not missing
    # And nothing else.
    assert "email_gateway_rate_limit_slack is 0. Write a number above 0." in texts


def test_mx_record_of_another_host(mx):
    text = mx.refusal(email_gateway_mailname="mx13.mail.example.com")
    assert "does not point at mx12.example.com: found 1 mx13.example.com" in text


def test_mx_record_is_shown_as_dig_shows_it(mx):
    # Values as they come from the command line are good, too.
    words = {"email_gateway_takeover": "false", "postfix_localmail_outgoing": "no", "email_gateway_timeout": "30"}
    done = mx.play("--check", **words)
    assert changed(done) == 0 and '"1 mx12.example.com"' in done.stdout


def test_no_mail_name_and_no_fqdn(mx):
    with broken(mx, Fault("hostname short", f"hostname {mx.fqdn}")):
        text = mx.refusal(email_gateway_mailname=None)
    assert 'The mail domain is "short"' in text and "It was taken from the host's FQDN" in text


def test_zulip_reads_an_inbox_already(mx):
    """With another pattern it would throw away all that it reads."""
    job = "/etc/cron.d/email-mirror"
    with broken(mx, Fault(f"echo '* * * * * zulip true' > {job}", f"rm {job}")):
        assert "Zulip already reads an inbox" in mx.refusal()


def test_port_25_is_held_by_another_program(mx):
    mx.sh(
        "systemctl stop postfix; for i in $(seq 300); do ss -Hltn 'sport = :25' | grep -q . || exit 0; sleep 0.1; done"
    )
    mx.sh("systemd-run --unit hold25 python3 -m http.server 25")
    try:
        mx.sh("for i in $(seq 300); do ss -Hltn 'sport = :25' | grep -q . && exit; sleep 0.1; done; exit 1")
        assert "Port 25 on mx12.example.com is held by python3" in mx.refusal()
    finally:
        mx.sh("systemctl stop hold25; systemctl start postfix")


def in_file(path: str, change: str) -> Fault:
    """A change (sed) that is taken back."""
    return Fault(f"cp -p {path} /root/kept; sed -i '{change}' {path}", f"cp -p /root/kept {path}")


def test_puppet_owns_postfix(mx):
    with broken(mx, in_file(ZULIP_CONF, "s/^puppet_classes.*/&, zulip::postfix_localmail/")):
        text = mx.refusal()
    assert "Zulip's Puppet owns Postfix" in text and "zulip::profile::standalone, zulip::postfix_localmail" in text


def test_zulip_that_takes_no_mail_fails_the_run(mx):
    with broken(mx, ZULIP_DOWN):
        done = mx.play("--tags", "zulip")
    assert done.returncode != 0 and "Zulip is in trouble (HTTP 502)" in done.stdout


def test_a_class_that_can_not_be_taken_out(mx):
    with broken(mx, in_file(ZULIP_CONF, "s/^puppet_classes.*/puppet_classes = zulip::postfix_localmail/")):
        text = mx.refusal(email_gateway_takeover=True)
    assert 'zulip.conf has "puppet_classes = zulip::postfix_localmail". Write all classes' in text


def test_zulip_sends_its_own_mail_through_this_host(mx):
    with broken(mx, in_file("/etc/zulip/settings.py", '$a EMAIL_HOST = "localhost"')):
        text = mx.refusal()
    assert "see EMAIL_HOST in /etc/zulip/settings.py" in text and "postfix_localmail_outgoing: true" in text


def test_the_operating_system_is_not_supported(mx):
    text = mx.refusal(__email_gateway_systems=["Debian 11"])
    assert text == "mx12.example.com runs Debian 12. This gateway supports Debian 11, as Zulip does."


def test_foreign_main_cf(mx):
    kept, main_cf = "/var/backups/zulip-email-gateway", in_file("/etc/postfix/main.cf", "/Zulip email gateway/d")
    with broken(mx, main_cf), broken(mx, Fault(f"mv {kept} {kept}.aside", f"mv {kept}.aside {kept}")):
        text = mx.refusal()
    assert f"/etc/postfix/main.cf on {mx.fqdn} was not written by this gateway" in text
    assert "postfix_localmail_adopt: true" in text


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        ("mv /home/zulip/deployments/current /home/zulip/deployments/aside", "there is no Zulip on this host"),
        ("echo 'EMAIL_GATEWAY_PATTERN = \"' >> /etc/zulip/settings.py", "settings.py, line 18, is not valid Python"),
    ],
)
def test_zulip_is_not_as_it_should_be(mx, spoil, words):
    """The other faults of Zulip's files: tests/test_zulip_info.py."""
    keep = "/home/zulip/deployments /etc/zulip"
    spoil = f"tar -cf /root/keep.tar {keep} 2>/dev/null; {spoil}"
    with broken(mx, Fault(spoil, f"rm -r {keep}; tar -xf /root/keep.tar -C /")):
        assert words in mx.refusal()


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"__postfix_localmail_database": "hash:/etc/aliases\nno parameter"}, "missing '=' after attribute name"),
        ({"__postfix_localmail_program": "/bin/false\nno service - - - - - -"}, 'invalid type field \\"service\\"'),
        ({"__postfix_localmail_reply": "("}, "zulip_aliases, line "),
    ],
)
def test_a_bad_configuration_never_replaces_a_good_one(mx, variables, words):
    """Nothing an operator may set makes a bad one; so one is forced with a variable of the role's own."""
    before = mx.sh("md5sum /etc/mailname /etc/postfix/*.cf /etc/postfix/zulip_*")
    done = mx.play("--tags", "postfix", **variables)
    assert done.returncode != 0 and "the new configuration is wrong, nothing was replaced" in done.stdout, done.stdout[
        -2000:
    ]
    assert words in done.stdout
    assert mx.sh("md5sum /etc/mailname /etc/postfix/*.cf /etc/postfix/zulip_*") == before
