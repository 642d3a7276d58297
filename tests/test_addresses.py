"""The address grammar, in the program and in Postfix's map: one grammar, not two."""

from __future__ import annotations

import re
from pathlib import Path

import jinja2
import pytest
import yaml
from email_gateway.addresses import NotAGatewayAddress, OtherPattern, Pattern, parse, redact
from hypothesis import given
from hypothesis import strategies as st

TOKEN = "0123456789abcdef0123456789abcdef"
ROLE = Path(__file__).parents[1] / "roles/postfix_localmail"
MAP = ROLE / "templates/etc/postfix/zulip_recipients.j2"
VARS = yaml.safe_load((ROLE / "vars/main.yml").read_text())

GOOD = [
    f"general.{TOKEN}",
    f"general+{TOKEN}",
    TOKEN,
    f"general.{TOKEN}.show-sender",
    f"general.{TOKEN}.prefer-html.include-quotes",
    f"{TOKEN}+show-sender",
    f"GENERAL.{TOKEN.upper()}",
    f"two-words_1.{TOKEN}",
    f"mm{TOKEN}",
    f"MM{TOKEN.upper()}",
]
BAD = ["", "info", "john.smith", "a+b", "x%y.z", "a b.c", f"mm{TOKEN[1:]}", f"a.{TOKEN[1:]}g", f"mm{TOKEN}x"]
BAD += [f"{TOKEN}@x", f"a.b.{TOKEN}", f"x.mm{TOKEN}", f".{TOKEN}", f"a.{TOKEN}."]


def postfix_map(pattern: str, domain: str) -> list[re.Pattern[str]]:
    """The patterns of the rendered map that accept."""
    environment = jinja2.Environment()
    environment.filters["comment"] = str
    values = {"ansible_managed": "", "postfix_localmail_pattern": pattern, "postfix_localmail_mailname": domain}
    for name in ("domain", "prefix", "reply", "channel"):
        text = VARS[f"__postfix_localmail_{name}"]
        values[f"__postfix_localmail_{name}"] = environment.from_string(text).render(values)
    text = environment.from_string(MAP.read_text()).render(values)
    return [re.compile(found, re.IGNORECASE | re.ASCII) for found in re.findall(r"^/(.*)/  OK$", text, re.MULTILINE)]


def accepted_by_program(address: str, pattern: Pattern) -> bool:
    try:
        parse(address, pattern)
    except NotAGatewayAddress:
        return False
    return True


@pytest.mark.parametrize("pattern", ["%s@mail.example.com", "user+%s@mail.example.com"])
@pytest.mark.parametrize(("local", "good"), [(x, True) for x in GOOD] + [(x, False) for x in BAD])
def test_program_and_postfix_agree(pattern, local, good):
    address = pattern.replace("%s", local)
    assert accepted_by_program(address, Pattern.parse(pattern)) == good
    assert any(one.search(address) for one in postfix_map(pattern, "mail.example.com")) == good


@given(st.from_regex(r"\A[a-f0-9.+mx_-]{30,40}\Z"))
def test_they_agree_on_everything_near(local):
    maps = postfix_map("%s@mail.example.com", "mail.example.com")
    address = f"{local}@mail.example.com"
    assert accepted_by_program(address, Pattern("", "mail.example.com")) == any(one.search(address) for one in maps)


def test_another_domain_is_the_operators_trouble():
    with pytest.raises(OtherPattern, match=r"mail for x.org, but the mail domain in gateway.conf is mail.example.com"):
        parse(f"{TOKEN}@x.org", Pattern("", "mail.example.com"))


def test_another_prefix_is_the_operators_trouble():
    """Mail that was queued before the pattern was changed: Postfix's map takes no other."""
    with pytest.raises(OtherPattern, match=r"mail for 0123...@x.org, but addresses begin with user\+ in gateway.conf"):
        parse(f"{TOKEN}@x.org", Pattern("user+", "x.org"))


def test_folded_and_told_apart():
    pattern = Pattern("", "mail.example.com")
    assert parse(f"General.{TOKEN.upper()}@MAIL.example.COM", pattern) == (f"general.{TOKEN}@mail.example.com", False)
    assert parse(f"mm{TOKEN}@mail.example.com", pattern).is_reply
    assert not parse(f"{TOKEN}@mail.example.com", pattern).is_reply


@pytest.mark.parametrize("text", ["mail.example.com", "%s@Mail.example.com", "%s%s@x", "a b%s@x.org", "%s@", "%s"])
def test_bad_pattern(text):
    with pytest.raises(ValueError, match="write it in lower case as"):
        Pattern.parse(text)


def test_tokens_are_shortened():
    assert redact(f"to <general.{TOKEN}@x> and mm{TOKEN.upper()}@x") == "to <general.0123...@x> and mm0123...@x"
