"""The header fields that only Zulip may set do not come with a mail."""

from __future__ import annotations

import email

import pytest
from email_gateway.headers import without_zulips_headers
from hypothesis import given
from hypothesis import strategies as st

ZULIPS = ("X-RcptTo", "X-MailFrom", "X-Peer")


@pytest.mark.parametrize(
    "header",
    [
        b"X-RcptTo: a@x\n",
        b"x-rcptto: a@x\n",
        b"X-RCPTTO:a@x\r\n",
        b"X-RcptTo: a@x,\n b@x,\n\tc@x\n",
        b"X-RcptTo :a@x\n",
        b"X-MailFrom: a@x\nX-Peer: 1\n",
        b"X-RcptTo: a@x\rX-Peer: 1\n",
    ],
)
def test_they_are_gone_and_nothing_else(header):
    message = b"From: a@x\n" + header + b"Subject: s\n\nX-RcptTo: in the body\n"
    assert without_zulips_headers(message) == b"From: a@x\nSubject: s\n\nX-RcptTo: in the body\n"


def test_a_lone_cr_hides_none():
    message = b"Subject: s\rX-RcptTo: a@x\nTo: b@x\n\nbody"
    assert email.message_from_bytes(message)["X-RcptTo"]  # so reads Python, and so Zulip
    assert without_zulips_headers(message) == b"Subject: s\rTo: b@x\n\nbody"


pieces = st.sampled_from(
    [
        b"X-RcptTo: a@x",
        b"x-peer:b",
        b"Subject: s",
        b"\n",
        b"\r\n",
        b"\r",
        b" ",
        b"\t",
        b":",
        b"word",
        b"X-RcptTo",
        b"\0",
    ]
)


@given(st.lists(pieces, max_size=12))
def test_whatever_comes_python_finds_none(parts):
    message = without_zulips_headers(b"".join(parts))
    assert [name for name in ZULIPS if email.message_from_bytes(message)[name] is not None] == []
