"""Aliases, former mail domains, Zulip's own senders, and who may write to whom."""

from __future__ import annotations

from pathlib import Path

import pytest
from email_gateway import address_book
from email_gateway.address_book import AddressBook, SendsOnly, Target
from email_gateway.addresses import NotAGatewayAddress, OtherPattern, Pattern
from email_gateway.message import Message
from email_gateway.senders import authors, entry, is_listed
from email_gateway.verdict import Deferred, Refused
from test_addresses import TOKEN

OTHER = "f" * 32
BOOK = AddressBook(
    Pattern("", "mail.example.com"),
    former=(Pattern("", "old.example.com"), Pattern("user+", "mail.example.com"), Pattern("zulip-", "in.example.org")),
    aliases={"support": Target(f"help.{TOKEN}.show-sender", "#help"), "ops": Target(OTHER, "#ops")},
    senders={"ops": ("monitoring@example.com", "@example.net"), TOKEN: ("@example.org",)},
    blocked=("spam@example.com", "@bad.example.com"),
    sends_from=("noreply@mail.example.com", "noreply-{token}@mail.example.com"),
)


@pytest.mark.parametrize(
    ("recipient", "text"),
    [
        (f"general.{TOKEN}@mail.example.com", f"general.{TOKEN}@mail.example.com"),
        (f"General.{TOKEN}@OLD.example.com", f"general.{TOKEN}@mail.example.com"),
        (f"mm{TOKEN}@old.example.com", f"mm{TOKEN}@mail.example.com"),
        (f"user+{TOKEN}.prefer-text@mail.example.com", f"{TOKEN}.prefer-text@mail.example.com"),
        (f"zulip-{TOKEN}@in.example.org", f"{TOKEN}@mail.example.com"),
        ("Support@mail.example.com", f"help.{TOKEN}.show-sender@mail.example.com"),
        ("ops@old.example.com", f"{OTHER}@mail.example.com"),
        ("zulip-ops@in.example.org", f"{OTHER}@mail.example.com"),
    ],
)
def test_what_an_address_stands_for(recipient, text):
    assert BOOK.parse(recipient).text == text
    assert BOOK.parse(recipient).token in text


@pytest.mark.parametrize("local", ["sales", "support+x", "support.prefer-text", "supports", "", "mmops", "zulip-ops"])
def test_what_is_none(local):
    with pytest.raises(NotAGatewayAddress):
        BOOK.parse(f"{local}@mail.example.com")
    assert BOOK.token_of(f"{local}@mail.example.com") == f"{local}@mail.example.com"


def test_another_domain_is_the_operators_trouble():
    with pytest.raises(OtherPattern, match=r"mail for x.org, but the mail domain in gateway.conf is mail.example.com"):
        BOOK.parse("support@x.org")


@pytest.mark.parametrize("local", ["noreply", "NoReply", "noreply-a1b2c3", "noreply-Ab_c-d"])
def test_zulip_only_sends_from_there(local):
    with pytest.raises(SendsOnly):
        BOOK.parse(f"{local}@mail.example.com")


@pytest.mark.parametrize("local", ["noreply-", "noreply-a.b", "xnoreply", "noreplyx"])
def test_others_are_not_zulips(local):
    with pytest.raises(NotAGatewayAddress) as caught:
        BOOK.parse(f"{local}@mail.example.com")
    assert not isinstance(caught.value, SendsOnly)


@pytest.mark.parametrize(
    ("recipient", "found", "cause"),
    [
        ("ops", ["monitoring@example.com"], ""),
        ("ops", ["<Monitoring@Example.com>", "x@EXAMPLE.net"], ""),
        ("ops", ["monitoring@example.com", "other@example.com"], "sender not listed"),
        ("ops", ["x@sub.example.net"], "sender not listed"),
        ("ops", ["x@notexample.net"], "sender not listed"),
        ("ops", [""], "sender not listed"),
        ("ops", ["monitoring@example.com", ""], "sender not listed"),
        (OTHER, ["anybody@example.com"], ""),
        (TOKEN, ["x@example.org"], ""),
        (TOKEN, ["x@example.net"], "sender not listed"),
        ("support", ["x@example.net"], "sender not listed"),
        (f"mm{OTHER}", [""], ""),
        (f"mm{OTHER}", ["spam@example.com"], "blocked sender"),
        (OTHER, ["fine@example.com", "x@bad.example.com"], "blocked sender"),
    ],
)
def test_who_may_write(recipient, found, cause):
    refused = BOOK.not_allowed(BOOK.parse(f"{recipient}@mail.example.com"), found)
    assert (refused.cause if refused else "") == cause
    assert refused is None or (refused.status == "5.7.1" and "example" not in refused.reason)


def test_who_is_not_restricted():
    assert not AddressBook(BOOK.pattern).is_restricted(BOOK.parse(f"{TOKEN}@mail.example.com"))
    assert AddressBook(BOOK.pattern, blocked=("@x.org",)).is_restricted(BOOK.parse(f"{OTHER}@mail.example.com"))


def test_an_alias_that_leads_nowhere_delays_its_mail():
    unknown = Refused("5.1.1", "unknown address", "no such channel")
    found = address_book.stale(BOOK.parse("ops@mail.example.com"), unknown)
    assert isinstance(found, Deferred) and "the alias ops leads to" in found.reason and OTHER not in found.reason
    assert address_book.stale(BOOK.parse(f"{OTHER}@mail.example.com"), unknown) is unknown
    not_allowed = unknown._replace(status="5.7.1")
    assert address_book.stale(BOOK.parse("ops@mail.example.com"), not_allowed) is not_allowed


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"aliases": {"a": {"to": "nothing", "channel": "#a"}}},
            "the alias a leads to nothing, which is no channel's address",
        ),
        ({"former": ["x"]}, "'x' is no EMAIL_GATEWAY_PATTERN"),
        ({"blocked": ["x"]}, "'x' is no sender; write 'user@example.com'"),
        ({"senders": {"a": ["a@b@c"]}}, "'a@b@c' is no sender"),
        ({"aliases": None}, "not what is expected"),
    ],
)
def test_a_fault_in_the_file_is_named(tmp_path, changes, words):
    from test_config import write_addresses

    write_addresses(tmp_path, **changes)
    with pytest.raises(ValueError, match=words):
        address_book.load(tmp_path / "addresses.json", BOOK.pattern)


def message(text: bytes, tmp_path: Path) -> Message:
    (tmp_path / "mail").write_bytes(text)
    return Message((tmp_path / "mail").open("rb"))


@pytest.mark.parametrize(
    ("header", "found"),
    [
        (b"From: a@example.com", ["a@example.com"]),
        (b"From: Ann <a@example.com>, b@example.net", ["a@example.com", "b@example.net"]),
        (b'From: "x@example.org" <a@example.com>', ["a@example.com"]),
        (b"From: Ann\r\n <a@example.com> (b@example.net)", ["a@example.com"]),
        (b"From: =?utf-8?q?x=40example.org?= <a@example.com>", ["a@example.com"]),
    ],
)
def test_who_has_written(tmp_path, header, found):
    assert authors(message(header + b"\r\nSubject: x\r\n\r\nFrom: c@example.com\r\n", tmp_path)) == found


@pytest.mark.parametrize(
    "header",
    [
        b"Subject: x",
        b"From: a@example.com\r\nFrom: b@example.net",
        b"From: a@example.com\rFrom: b@example.net",
        b"From: nobody",
        b"From: ",
        b"From: a@example.com <b@example.net>",
        b"From: <a@example.com> b@example.net",
        b"From: a@example.com@example.net",
        b'From: "a@example.com <b@example.net>',
        b"From: a@example.com, " + b"x" * 3000,
    ],
)
def test_who_has_written_is_not_clear(tmp_path, header):
    """None of these passes for example.com, however Python's version reads it."""
    found = authors(message(header + b"\r\n\r\n", tmp_path))
    assert not all(is_listed(sender, ["@example.com"]) for sender in found)


@pytest.mark.parametrize("text", ["example.com", "a b@example.com", "a@", "@", "a@b,c@d", "<a@b>"])
def test_no_entry_of_a_list(text):
    with pytest.raises(ValueError, match="is no sender"):
        entry(text)


def test_an_entry():
    assert entry("@Example.com") == "@example.com"
    assert is_listed("A@example.COM", ["@example.com"]) and not is_listed("", ["@"])
