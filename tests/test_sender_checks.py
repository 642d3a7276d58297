"""What follows from what SPF, DKIM and DMARC say of a sender."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from email_gateway import sender_checks
from email_gateway.sender_checks import Findings, findings, verdict, warning
from email_gateway.verdict import Deferred, Refused

ROLE = Path(__file__).parents[1] / "roles/postfix_localmail/templates/etc"
AUTHOR = ["a@example.org"]


def field(text: str) -> bytes:
    return f"Subject: x\nX-Zulip-Email-Gateway-Sender: {text}\nFrom: a@example.org".encode()


@pytest.mark.parametrize(
    ("header", "authors", "found"),
    [
        (b"Subject: x", AUTHOR, None),
        (field("dmarc=local"), AUTHOR, None),
        (field("spf=pass dmarc=fail-none domain=example.org"), AUTHOR, Findings("fail-none", "pass", "example.org")),
        (field("dmarc=unclear spf=pass"), AUTHOR, Findings("fail-reject", "pass")),
        # rspamd has read another author.
        (field("dmarc=pass spf=pass domain=example.net"), AUTHOR, Findings("fail-reject", "pass")),
        (
            field("dmarc=pass spf=pass domain=xn--mnchen-3ya.de"),
            ["a@münchen.de"],
            Findings("pass", "pass", "xn--mnchen-3ya.de"),
        ),
        (field("dmarc=pass spf=pass domain=example.org"), ["A@EXAMPLE.ORG"], Findings("pass", "pass", "example.org")),
        (field("dmarc=pass spf=pass"), [], Findings("fail-reject", "pass")),
        (field(""), AUTHOR, Findings()),
        (field("dmarc=none spf=pass\r"), AUTHOR, Findings("none", "pass")),
        # Who has written it is not clear: what DMARC says is about somebody.
        (field("dmarc=pass spf=pass domain=example.org"), [*AUTHOR, "b@example.net"], Findings("fail-reject", "pass")),
        (field("dmarc=none spf=pass"), [*AUTHOR, ""], Findings("fail-reject", "pass")),
        (field("dmarc=none spf=pass"), [""], Findings("fail-reject", "pass")),
        # The first is ours.
        (field("dmarc=fail-reject") + b"\n" + field("dmarc=pass"), AUTHOR, Findings("fail-reject")),
    ],
)
def test_what_stands_in_the_header(header, authors, found):
    assert findings(header, authors) == found


REJECTED, LATER = Refused, Deferred


@pytest.mark.parametrize(
    ("dmarc", "spf", "mark", "enforce", "reply"),
    [
        ("pass", "fail", None, None, None),
        ("none", "none", None, None, None),
        ("none", "pass", None, None, None),
        ("none", "softfail", None, None, None),
        ("none", "fail", None, None, REJECTED),
        ("permerror", "fail", None, None, REJECTED),
        ("none", "temperror", None, None, LATER),
        ("fail-none", "pass", None, None, REJECTED),
        ("fail-quarantine", "fail", None, None, REJECTED),
        ("fail-reject", "fail", None, REJECTED, REJECTED),
        ("temperror", "pass", LATER, LATER, LATER),
        ("", "", LATER, LATER, LATER),
    ],
)
def test_what_follows_from_it(dmarc, spf, mark, enforce, reply):
    found = Findings(dmarc, spf, "example.org")
    assert verdict("off", found, is_reply=True) is None
    for said, expected in (
        (verdict("mark", found, is_reply=True), mark),
        (verdict("enforce", found, is_reply=False), enforce),
        (verdict("enforce", found, is_reply=True), reply),
    ):
        assert isinstance(said, expected) if expected else said is None
        assert said is None or ("example.org" in said.reason and said.reason.isascii())
    assert verdict("enforce", None, is_reply=True) is None


@pytest.mark.parametrize(
    ("dmarc", "words"),
    [
        *(("pass", ""), ("none", ""), ("fail-none", ""), ("permerror", "")),
        *(("fail-quarantine", "example.org does not vouch"), ("fail-reject", "example.org does not vouch")),
        *(("temperror", "could not be checked"), ("", "could not be checked")),
    ],
)
def test_what_is_warned_of(dmarc, words):
    line = warning(Findings(dmarc, "fail", "example.org"))
    assert words in line and bool(line) == bool(words) and "\n" not in line
    assert warning(None) == ""


def test_rspamd_writes_the_field_that_is_read():
    """And Postfix removes it from what comes in."""
    conf = (ROLE / "zulip-email-gateway-senders.conf.j2").read_text()
    assert f"'{sender_checks.FIELD}'" in conf
    assert f"/^{sender_checks.FIELD}[[:space:]]*:/ IGNORE" in (ROLE / "postfix/zulip_header_checks.j2").read_text()
    said = set(re.findall(r"\{'(?:DMARC|R_SPF)_\w+', '([a-z-]+)'\}", conf))
    assert "dmarc = 'unclear'" in conf and "dmarc = 'local'" in conf
    known = {"pass", "temperror", "fail-reject", "fail-quarantine", "fail-none", "permerror", "none"}
    assert said == known | {"fail", "softfail", "neutral"}
