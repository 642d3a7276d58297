"""The address grammar, in the program and in Postfix's map: one grammar, not two."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import pytest
from email_gateway.address_book import AddressBook, SendsOnly, Target
from email_gateway.addresses import NotAGatewayAddress, OtherPattern, Pattern, parse, redact
from hypothesis import given
from hypothesis import strategies as st
from jinja2.nativetypes import NativeEnvironment
from role_files import variables

TOKEN = "0123456789abcdef0123456789abcdef"
ROLE = Path(__file__).parents[1] / "roles/postfix_localmail"
MAP = ROLE / "templates/etc/postfix/zulip_recipients.j2"
VARS = variables("postfix_localmail")

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


@cache
def postfix_map(pattern: str, *former: str, aliases: tuple[str, ...] = ()) -> list[tuple[re.Pattern[str], str]]:
    """The patterns of the rendered map, and what each stands for."""
    native, environment = NativeEnvironment(), jinja2.Environment()
    native.filters["split"] = str.split
    environment.filters["comment"] = str
    values = {
        "ansible_managed": "",
        "postfix_localmail_pattern": pattern,
        "postfix_localmail_former_patterns": list(former),
        "postfix_localmail_aliases": list(aliases),
        "postfix_localmail_sends_from": ["noreply@mail.example.com", "noreply-{token}@mail.example.com"],
    }
    first = ("options", "patterns", "domains", "domain", "expressions", "reply", "channels_part", "channel")
    for name in (*first, "aliases_part", "alias", "sender"):
        values[f"__postfix_localmail_{name}"] = rendered(native, f"__postfix_localmail_{name}", values)
    text = environment.from_string(MAP.read_text()).render(values)
    found = re.findall(r"^/(.*)/  (.*)$", text, re.MULTILINE)
    return [(re.compile(pattern, re.IGNORECASE | re.ASCII), result) for pattern, result in found]


def rendered(environment: NativeEnvironment, name: str, values: dict[str, Any]) -> Any:
    """A variable of the role, which may be a list."""
    found = environment.from_string(VARS[name]).render(values) if isinstance(VARS[name], str) else VARS[name]
    return found if isinstance(found, str) else list(found)


def accepted_by_postfix(address: str, pattern: str = "%s@mail.example.com", *former: str, **more: Any) -> bool:
    results = [result for one, result in postfix_map(pattern, *former, **more) if one.search(address)]
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


FORMER = ("%s@old.example.com", "user+%s@mail.example.com")
BOOK = AddressBook(
    Pattern("", "mail.example.com"),
    tuple(map(Pattern.parse, FORMER)),
    {"support": Target(TOKEN, "#a"), "a.b": Target(TOKEN, "#a")},
    sends_from=("noreply@mail.example.com", "noreply-{token}@mail.example.com"),
)


@given(st.from_regex(r"\A(user[+])?(a[.x]b|support|noreply(-[a-c]*)?|" + TOKEN + r")[.]?@(mail|old)[.]example[.]com\Z"))
def test_they_agree_on_aliases_former_domains_and_zulips_senders(address):
    try:
        is_accepted = bool(BOOK.parse(address))
    except SendsOnly:
        is_accepted = True
    except NotAGatewayAddress:
        is_accepted = False
    assert accepted_by_postfix(address, "%s@mail.example.com", *FORMER, aliases=("support", "a.b")) == is_accepted
