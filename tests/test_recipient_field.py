"""To whom a mail in an inbox was sent, as Zulip finds it."""

from __future__ import annotations

import time

import pytest
from email_gateway.addresses import Pattern
from email_gateway.recipient_field import find_recipient
from hypothesis import given
from hypothesis import strategies as st
from test_addresses import TOKEN

PATTERN = Pattern("zulip+", "example.com")
WANTED = f"zulip+general.{TOKEN}@example.com"
OTHER = f"zulip+mm{TOKEN}@example.com"


@pytest.mark.parametrize(
    "header",
    [
        f"To: {WANTED}",
        f"To: <{WANTED}>",
        f'To: "General, the channel" <{WANTED}>',
        f"To: General, the channel <{WANTED}>",
        f"To: =?utf-8?q?Caf=C3=A9?= <{WANTED}>",
        f"To: someone@example.org,\n {WANTED}",
        f"To: a list:\n\tsomeone@example.org,\n\t<{WANTED}>;",
        f"To: ZULIP+GENERAL.{TOKEN.upper()}@EXAMPLE.COM",
        f"CC: someone@example.org\nCc: {WANTED}",
        f"To: {OTHER}\nDelivered-To: {WANTED}",
        f"Delivered-To: {OTHER}\nX-Gm-Original-To: {WANTED}",
        f"Delivered-To: zulip@example.com\nEnvelope-To: {WANTED}",
        f"CC: {OTHER}\nTo: {WANTED}",
        f"Resent-CC: {OTHER}\nResent-To: {WANTED}",
        f"To: zulip@example.com, <broken, {WANTED}",
        f"To: \xff\xfe <{WANTED}>",
        f"To: {'(' * 5000} {WANTED}",
    ],
)
def test_found(header):
    assert find_recipient(f"From: x@example.org\n{header}\nSubject: s\n".encode("latin-1"), PATTERN) == WANTED


@pytest.mark.parametrize("header", ["To: zulip@example.com", f"To: {WANTED}.org", "", "To:", f"Bcc: {WANTED}"])
def test_not_found(header):
    assert find_recipient(header.encode(), PATTERN) is None


@given(st.binary(max_size=200))
def test_nothing_breaks_it(garbage):
    find_recipient(b"To: " + garbage, PATTERN)


@pytest.mark.parametrize("unit", [b"\\", b".", b"@", b"a@", b"(", b"<", b'"', b"a@b,", b"\r\n "])
def test_whatever_stands_there_takes_no_time(unit):
    started = time.process_time()
    find_recipient(b"To: " + unit * (2**17 // len(unit)) + b"\r\n\r\n", PATTERN)
    find_recipient((b"To: " + unit * (4000 // len(unit)) + b"\r\n") * 32, PATTERN)
    assert time.process_time() - started < 2


def test_an_address_far_behind_is_found():
    header = b"To: " + b"a@example.org, " * 2000 + b"General <zulip+x@example.com>\n"
    assert find_recipient(header, PATTERN) == "zulip+x@example.com"
