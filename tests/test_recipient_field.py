"""To whom a mail in an inbox was sent, as Zulip finds it."""

from __future__ import annotations

import time

import pytest
from email_gateway.address_book import AddressBook, Target
from email_gateway.addresses import Pattern
from email_gateway.recipient_field import find_recipients
from hypothesis import given
from hypothesis import strategies as st
from test_addresses import TOKEN

BOOK = AddressBook(Pattern("zulip+", "example.com"))
WANTED = f"zulip+general.{TOKEN}@example.com"
OTHER = f"zulip+mm{TOKEN}@example.com"
IDENTITY = "Message-ID: <1@example.org>\nDate: Mon, 1 Jan 2024 00:00:00 +0000"
NOT_OURS = "To: zulip+general@example.com, zulip+mm12@example.com"
NOTED = ("X-Gm-Original-To", "X-Original-To", "Delivered-To", "X-Delivered-To", "Envelope-To", "X-Envelope-To")
NOTED += ("X-Forwarded-To",)


def found(header: str) -> list[str]:
    return find_recipients(f"From: x@example.org\n{header}\nSubject: s\n".encode("latin-1"), BOOK)


@pytest.mark.parametrize(
    "header",
    [
        f"To: {WANTED}",
        f"To: <{WANTED}>",
        f'To: "General, the channel" <{WANTED}>',
        f"To: General, the channel <{WANTED}>",
        f'To: "zulip+general.{TOKEN}"@example.com',
        f"To: =?utf-8?q?Caf=C3=A9?= <{WANTED}>",
        f"To: someone@example.org,\n {WANTED}",
        f"To: a list:\n\tsomeone@example.org,\n\t<{WANTED}>;",
        f"To: ZULIP+GENERAL.{TOKEN.upper()}@EXAMPLE.COM",
        f"To: zulip+nothing@example.com, {WANTED}",
        f"CC: someone@example.org\nCc: {WANTED}",
        f"Bcc: {WANTED}",
        f"To: zulip@example.com, <broken, {WANTED}",
        f"To: \xff\xfe <{WANTED}>",
        f"To: {'(' * 5000} {WANTED}",
        *(f"{field}: {WANTED}\nTo: {OTHER}" for field in NOTED),
        f"Resent-To: {WANTED}\nTo: {OTHER}",
        f"Delivered-To: zulip@example.com\nEnvelope-To: {WANTED}",
        # A copy for the other one could not be told from this one.
        f"Delivered-To: {WANTED}\nTo: {OTHER}, {WANTED}",
        f"Delivered-To: {WANTED}\nTo: {OTHER}, {WANTED}\nMessage-ID: <1@example.org>",
        f"Received: from a by b for <{WANTED}>; Mon, 1 Jan 2024\nTo: list@example.org",
        f"Received: from a by b;\n Mon\nReceived: from c by a\n\tfor {WANTED}; Mon\nTo: {OTHER}",
        f"Received: from a by b for <{WANTED}>; Mon\nReceived: from x by a for <{OTHER}>; Mon",
    ],
)
def test_found(header):
    assert found(header) == [WANTED]


@pytest.mark.parametrize(
    "header",
    [
        f"To: {WANTED}, {OTHER}, {WANTED.upper()}",
        f"To: {WANTED}\nCc: someone@example.org, {OTHER}",
        f"To: {WANTED}\nBcc: {OTHER}",
        f"Resent-To: {WANTED}\nResent-CC: {OTHER}\nTo: zulip+x.{TOKEN[::-1]}@example.com",
        f"X-Original-To: {WANTED}\nDelivered-To: {OTHER}\nTo: zulip+x.{TOKEN[::-1]}@example.com",
        f"Delivered-To: {WANTED}\nTo: {OTHER}, {WANTED}\n{IDENTITY}",
    ],
)
def test_a_mail_to_two(header):
    """Also where the provider keeps one copy only, and notes one of them."""
    assert found(header) == [WANTED, OTHER]


@pytest.mark.parametrize(
    "header", ["To: zulip@example.com", f"To: {WANTED}.org", "", "To:", f"To: x{WANTED}", NOT_OURS]
)
def test_not_found(header):
    assert found(header) == []


@pytest.mark.parametrize(
    ("pattern", "address"),
    [
        ("%s@in.example.com", f"general.{TOKEN}@in.example.com"),
        ("zulip-%s@example.com", f"zulip-general.{TOKEN}@example.com"),
        ("zulip-%s@example.com", f"zulip-mm{TOKEN}@example.com"),
    ],
)
def test_other_patterns(pattern, address):
    assert find_recipients(
        f"To: nobody@example.com, {address}, a@in.example.com\n".encode(), AddressBook(Pattern.parse(pattern))
    ) == [address]


@given(st.binary(max_size=200))
def test_nothing_breaks_it(garbage):
    find_recipients(b"To: " + garbage, BOOK)


@pytest.mark.parametrize(
    "unit", [b"\\", b".", b"@", b"a@", b"(", b"<", b'"', b"a@b,", b"\r\n ", b"zulip+", b"zulip+a@", b"a." * 250]
)
def test_whatever_stands_there_takes_no_time(unit):
    started = time.process_time()
    find_recipients(b"To: " + unit * (2**17 // len(unit)) + b"\r\n\r\n", BOOK)
    find_recipients((b"To: " + unit * (4000 // len(unit)) + b"\r\n") * 32, BOOK)
    any_prefix = AddressBook(Pattern("", "example.com"))
    find_recipients(b"Received: for " + unit * (2**17 // len(unit)) + b"\r\n\r\n", any_prefix)
    assert time.process_time() - started < 2


def test_an_address_far_behind_is_found():
    assert found("To: " + "a@example.org, " * 2000 + f"General <{WANTED}>") == [WANTED]


def test_aliases_and_former_patterns_and_each_channel_once():
    former = (Pattern("", "old.example.com"),)
    book = BOOK._replace(former=former, aliases={"help": Target(f"support.{TOKEN}", "#support")})
    written = f"zulip+help@example.com, zulip+x.{TOKEN}@example.com, {TOKEN[::-1]}@old.example.com, help@example.com"
    assert find_recipients(f"To: {written}\n".encode(), book) == [
        "zulip+help@example.com",
        f"{TOKEN[::-1]}@old.example.com",
    ]
