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
BAD += [f"{TOKEN}.word", f"{TOKEN}@x", f"a.b.{TOKEN}", f"x.mm{TOKEN}", f".{TOKEN}", f"a.{TOKEN}."]


def postfix_map(pattern: str, domain: str) -> list[tuple[re.Pattern[str], str]]:
    """The patterns of the rendered map, and what each stands for."""
    environment = jinja2.Environment()
    environment.filters["comment"] = str
    values = {"ansible_managed": "", "postfix_localmail_pattern": pattern, "postfix_localmail_mailname": domain}
    values["__postfix_localmail_options"] = VARS["__postfix_localmail_options"]
    for name in ("domain", "prefix", "reply", "channel"):
        text = VARS[f"__postfix_localmail_{name}"]
        values[f"__postfix_localmail_{name}"] = environment.from_string(text).render(values)
    text = environment.from_string(MAP.read_text()).render(values)
    found = re.findall(r"^/(.*)/  (.*)$", text, re.MULTILINE)
    return [(re.compile(pattern, re.IGNORECASE | re.ASCII), result) for pattern, result in found]


def accepted_by_postfix(address: str, pattern: str = "%s@mail.example.com") -> bool:
    results = [result for one, result in postfix_map(pattern, "mail.example.com") if one.search(address)]
    return results[0] == "DUNNO"


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
    assert accepted_by_postfix(address, pattern) == good


OTHER = TOKEN[::-1]


@pytest.mark.parametrize(
    ("local", "token"),
    [
        (f"general.{TOKEN}.show-sender", TOKEN),
        (f"General+{TOKEN.upper()}+word+{OTHER}", TOKEN),
        (f"{OTHER}.{TOKEN}", TOKEN),
        (f"show-sender.{TOKEN}", TOKEN),
        (f"mm{TOKEN}", f"mm{TOKEN}"),
        (f"{TOKEN}.word", ""),
        (f"show-sender.{TOKEN}.word", ""),
    ],
)
def test_what_tells_a_channel_is_what_zulip_looks_up(local, token):
    """zerver/lib/email_mirror_helpers.py: without the options the second part, or the only one."""
    pattern = Pattern("user+", "mail.example.com")
    if not token:
        with pytest.raises(NotAGatewayAddress):
            parse(f"user+{local}@mail.example.com", pattern)


@given(st.from_regex(r"\A[a-f0-9.+mx_-]{30,40}\Z"))
def test_they_agree_on_everything_near(local):
    address = f"{local}@mail.example.com"
    assert accepted_by_program(address, Pattern("", "mail.example.com")) == accepted_by_postfix(address)


def test_another_domain_is_the_operators_trouble():
    with pytest.raises(OtherPattern, match=r"mail for x.org, but the mail domain in gateway.conf is mail.example.com"):
        parse(f"{TOKEN}@x.org", Pattern("", "mail.example.com"))


def test_another_prefix_is_the_operators_trouble():
    """Mail that was queued before the pattern was changed: Postfix's map takes no other."""
    with pytest.raises(OtherPattern, match=r"mail for 0123...@x.org, but addresses begin with user\+ in gateway.conf"):
        parse(f"{TOKEN}@x.org", Pattern("user+", "x.org"))


def test_folded_and_told_apart():
    pattern = Pattern("", "mail.example.com")
    assert parse(f"General.{TOKEN.upper()}@MAIL.example.COM", pattern) == (
        f"general.{TOKEN}@mail.example.com",
        False,
        TOKEN,
        "",
    )
    assert parse(f"mm{TOKEN}@mail.example.com", pattern).is_reply
    assert not parse(f"{TOKEN}@mail.example.com", pattern).is_reply


@pytest.mark.parametrize("text", ["mail.example.com", "%s@Mail.example.com", "%s%s@x", "a b%s@x.org", "%s@", "%s"])
def test_bad_pattern(text):
    with pytest.raises(ValueError, match="write it in lower case as"):
        Pattern.parse(text)


def test_tokens_are_shortened():
    assert redact(f"to <general.{TOKEN}@x> and mm{TOKEN.upper()}@x") == "to <general.0123...@x> and mm0123...@x"
