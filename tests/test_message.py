"""A mail on the disk; the header fields that only Zulip may set do not come with it."""

from __future__ import annotations

import email
import re
import tempfile
import time
from pathlib import Path

import pytest
from email_gateway import message as module
from hypothesis import given
from hypothesis import strategies as st
from mails import mail, text

ZULIPS = ("X-RcptTo", "X-MailFrom", "X-Peer")


def without_zulips_headers(message: bytes, piece: int = module.PIECE) -> bytes:
    """By way of files, read in pieces of so many bytes."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(module, "PIECE", piece)
        return text(mail(message).without_reserved_fields(Path(folder)))


def in_memory(message: bytes) -> bytes:
    """The same, field by field: slower, and easy to follow."""
    field = re.compile(rb"[^\r\n]*(?:\r\n|\r|\n|\Z)(?:[ \t][^\r\n]*(?:\r\n|\r|\n|\Z))*")
    reserved = re.compile(rb"X-(?:RcptTo|MailFrom|Peer)[ \t]*:", re.IGNORECASE)
    kept, position = [], 0
    while position < len(message) and message[position] not in b"\r\n":
        found = field.match(message, position)
        assert found
        kept += [] if reserved.match(message, position) else [found[0]]
        position = found.end()
    header, rest = b"".join(kept), message[position:]
    return header + b"\n" * (header[-1:] == b"\r" and rest[:1] == b"\n") + rest


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


@pytest.mark.parametrize("piece", [3, 1000])
def test_a_field_that_goes_does_not_take_the_empty_line_with_it(piece):
    """The CR before it and the LF behind it would be one line end, and the body part of the header."""
    message = b"Subject: s\rX-RcptTo: a@x\n\nX-RcptTo: in the body\n"
    assert without_zulips_headers(message, piece) == b"Subject: s\r\n\nX-RcptTo: in the body\n"


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


@given(st.lists(pieces, max_size=12), st.sampled_from([3, 7, 64, 1000]))
def test_whatever_comes_python_finds_none(parts, piece):
    whole = b"".join(parts)
    message = without_zulips_headers(whole, piece)
    assert message == in_memory(whole)
    assert [name for name in ZULIPS if email.message_from_bytes(message)[name] is not None] == []


def test_a_mail_without_them_is_not_even_copied(tmp_path):
    for content in (b"Subject: X-Peer\n\nX-Peer: 1\n", b"Subject: s\n\nX-Peer: 1\n", b"\nX-Peer: 1\n"):
        one = mail(content)
        assert one.without_reserved_fields(tmp_path) is one


BOMBS = {
    "header lines": b"A:\n" * 6_000_000,
    "continuation lines": b"A: x\n" + b" \n" * 9_000_000,
    "continuation lines of a reserved field": b"X-Peer: x\n" + b" \n" * 9_000_000,
    "reserved fields": b"A:\nX-Peer:\n" * 1_600_000,
    "one line": b"X-Peer: x\nA: " + b"x" * 18_000_000,
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs(tmp_path, name):
    """Three times what was measured: a machine under load."""
    bomb = mail(BOMBS[name])
    started = time.process_time()
    text(bomb.without_reserved_fields(tmp_path))
    assert time.process_time() - started < 1.5


def test_a_line_that_continues_another_field_stays():
    """A reserved field that ends with one piece, a piece without one, and a piece that begins with such a line."""
    message = b"X-Peer: abcdefg\r\n" + b"A: abcdefghijkl\r\n" + b" of the field A\r\n" + b"\r\nText"
    assert without_zulips_headers(message, 17) == message[17:]
