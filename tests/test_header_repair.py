"""Zulip 11's SMTP server can write out every mail that it gets."""

from __future__ import annotations

import email
import io
import re
from email.generator import BytesGenerator
from itertools import product
from pathlib import Path

import pytest
from email_gateway import header_repair as module
from email_gateway.header_repair import NeverAccepted, enterable
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from mails import mail, text

# What newer versions of Python refuse in a field that they have written (email/generator.py).
BROKEN = re.compile(rb"\r\n[^ \t]|\r[^ \n\t]|\n[^ \t]")


class StrictGenerator(BytesGenerator):
    """Writes headers as Python 3.14 does."""

    def _write_headers(self, msg) -> None:
        for name, value in msg.raw_items():
            field = self.policy.fold_binary(name, value)
            assert not BROKEN.search(field.removesuffix(b"\n"))
            self._fp.write(field)
        self.write(self._NL)


def can_be_written(content: bytes) -> bool:
    """Whether Zulip's server can do its bytes(message), with an old and with a new Python."""
    try:
        message = email.message_from_bytes(content)
        bytes(message)
        StrictGenerator(io.BytesIO(), mangle_from_=False, policy=message.policy).flatten(message)
    except Exception:
        return False
    return True


def repaired(content: bytes, folder: Path) -> bytes:
    message = mail(content)
    assert not can_be_written(content)
    result = enterable(message, folder)
    assert result is not message
    assert can_be_written(text(result))
    assert len(text(result)) == len(content)
    assert enterable(result, folder) is result
    return text(result)


@pytest.mark.parametrize(
    "content",
    [
        b"Subject: a%sb\n\nbody\n",
        b"Subject: %sX-RcptTo: c\n\nbody\n",
        b"A: b\nSubject: a\n b%sc\n d\nB: c\n\nbody\n",
        b"Content-Type: text/plain; charset=%sutf-8\n\nbody \xff\n",
        b"A: \xff\nSubject: a%sb",
        b"Subject: a%sb\nnone\n\n",
        b"Content-Type: multipart/mixed; boundary=b\n\n--b\nSubject: a%sb\n\n\xff\n--b--\n",
        b'Content-Type: multipart/mixed; boundary="b:c"\n\n--b:c\nSubject: a%sb\n--b:c--\n',
        b"Content-Type: multipart/signed; boundary*=us-ascii''b\n\n--b\nA: b\n\nc\n--b\nA: a%sb\n\n\n--b--",
        b"Content-Type: message/rfc822\n\nSubject: a%sb\n\nbody\n",
        b"Content-Type: multipart/digest; boundary=b\n\n--b\n\nSubject: a%sb\n\nx\n--b\n\n--b--\n",
        b"Content-Type: message/delivery-status\n\nA: b\n\nB: c\nSubject: a%sb\n",
    ],
    ids=range(12),
)
def test_a_header_is_repaired(tmp_path, content):
    for separator, line_end in product((b"\x0b", b"\x0c", b"\x1c", b"\x1d", b"\x1e"), (b"\r\n", b"\n", b"\r")):
        one = content.replace(b"\n", line_end) % separator
        assert repaired(one, tmp_path) == one.replace(separator, b" ")


def test_nothing_else_is_repaired(tmp_path):
    body = b"a\x0bb\x0c\r\nSubject: a\x0bb\r\n\r\n\xff"
    content = b"A: \x0b\r\nB: a\x1e c\r\nC: \xe4\x0bb\r\nD: a\x0bb\x0b\x0bc\x1d\x1f\r\n\r\n" + body
    assert repaired(content, tmp_path) == content.replace(b"D: a\x0bb\x0b\x0bc", b"D: a b\x0b c")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"Subject: \xc2\x85\xe2\x80\xa8\x85\n\nbody \x0b\xff\n",
        b"Subject: a\x0b b\x1f\n\n\x0bA: b\x0bc\n",
        b"A: \xff\x0bb\n\n",
        b"no header\nA: b\x0bc\n",
        b"Content-Type: multipart/mixed; boundary=b\n\n--c\nA: b\x0bc\n\n--b\n\nA: b\x0bc\n--b--\nA: b\x0bc\n",
        b"Content-Type: multipart/mixed; boundary=b\n\nASCII only\n",
        b"Content-Type: multipart/mixed; boundary=b\n\n--b\n\n\xff\n--b--\n\xff\n",
        b'Content-Type: multipart/x; boundary="b:c"\n\n--b:c\nContent-Type: message/x\n--b:c\n\nA: a\x0bb\n',
        b"Content-Type: text/plain\n\n" + b"multipart/message/\n" * 200,
        b"Content-Type: multipart/mixed; boundary=b\n\n" + b"--b\nContent-Type: message/rfc822\n\nA: b\n" * 200,
    ],
    ids=range(11),
)
def test_what_can_be_written_is_unchanged(tmp_path, content):
    message = mail(content)
    assert can_be_written(content)
    assert enterable(message, tmp_path) is message
    assert text(message) == content


def nested(depth: int, kind: bytes = b"mixed") -> bytes:
    levels = b"".join(b"Content-Type: multipart/%s; boundary=b%d\n\n--b%d\n" % (kind, n, n) for n in range(depth))
    return levels + b"\ntext\n"


def below(frames: int, content: bytes) -> bool:
    return below(frames - 1, content) if frames else can_be_written(content)


@pytest.mark.parametrize(
    "deep",
    [
        nested,
        lambda depth: nested(depth, b"signed"),
        lambda depth: b"Content-Type: message/rfc822\n\n" * depth + b"\ntext\n",
        lambda depth: b"".join(
            b"Content-Type: multipart/digest; boundary=b%d\n\n--b%d\n\n" % (n, n) for n in range((depth + 1) // 2)
        ),
    ],
    ids=["mixed", "signed", "messages", "digests"],
)
def test_parts_nested_too_deep(tmp_path, deep):
    message = mail(deep(100))
    assert below(100, deep(100))
    assert enterable(message, tmp_path) is message
    assert not below(100, deep(250))
    for depth in (101, 250, 10_000):
        with pytest.raises(NeverAccepted, match=r"nested too deeply for Zulip \(more than 100\)"):
            enterable(mail(deep(depth)), tmp_path)


@pytest.mark.parametrize("size", [1, 7, 100])
def test_it_does_not_matter_how_it_is_read(tmp_path, monkeypatch, size):
    monkeypatch.setattr("email_gateway.message.PIECE", size)
    content = b"Content-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\nA: b\r\n\r\n\xff\r\n--b\r\nA: a\x0bb\r\n\r\n"
    assert repaired(content, tmp_path) == content.replace(b"\x0b", b" ")
    with pytest.raises(NeverAccepted):
        enterable(mail(nested(250)), tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"Content-Type: multipart/mixed\n\n\xff", "has none"),
        (b"Content-Type: multipart/mixed; boundary=b\n\n\xff\n--b--\n", "has none"),
        (b"Content-Type: multipart/x; boundary=b\n\n--b\nContent-Type: multipart/y; boundary=b\n\n\xff\n--b\n", "none"),
        (b"Content-Type: multipart/mixed; boundary*=undefined''b\n\n\xff", "cannot be read"),
    ],
    ids=range(4),
)  # fmt: skip
def test_what_cannot_be_repaired(tmp_path, content, reason):
    assert not can_be_written(content)
    with pytest.raises(NeverAccepted, match=reason):
        enterable(mail(content), tmp_path)


def test_an_error_of_ours_changes_nothing(tmp_path, monkeypatch):
    def fail(*_args):
        raise LookupError

    monkeypatch.setattr(module, "_spans", fail)
    message = mail(b"Subject: a\x0bb\n\n")
    assert enterable(message, tmp_path) is message


def test_a_full_disk_is_not_hidden(tmp_path):
    with pytest.raises(OSError):
        enterable(mail(b"Subject: a\x0bb\n\n"), tmp_path / "none")


FRAGMENTS = [
    b"Content-Type: multipart/mixed; boundary=b\n",
    b'content-type: multipart/digest;\n boundary="c"\n',
    b"Content-Type: message/rfc822\n",
    b"Content-Type: message/delivery-status\n",
    b"Content-Type: text/plain\n",
    *(b"\n", b"\n\n", b"\r\n", b"\r", b"--b\n", b"--b--\n", b"\n--b\n", b"--c \n", b"--c--\n", b"--b: c\n", b": a\n"),
    *(b"A: b\n", b"A:", b" ", b"\t", b"\n ", b"c:", b"x" * 80, b"; ", b"\xff", b"\x85", b"\x00", b"\x1f", b"text\n"),
    *(b"\x0b", b"\x0c", b"\x1c", b"\x1d", b"\x1e", b"A: a\x0bb\n", b"A: \x1ec: d\n"),
]


@settings(deadline=None, max_examples=400)
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=20).map(b"".join))
@example(b"Content-Type: multipart/mixed; boundary=b\n\n--b\nA: \x1ec: d\n")
def test_what_is_returned_can_be_written(tmp_path_factory, content):
    # Python overlooks the end of a multipart that follows a boundary at once.
    assume(not re.search(rb"(?m)^--(?:b|c ?)(?:\r\n?|\n)--[bc]", content))
    # Nobody has parts in the blocks of a message/delivery-status.
    assume(not re.search(rb"(?is)delivery-status.*multipart", content))
    message = mail(content)
    try:
        result = enterable(message, tmp_path_factory.getbasetemp())
    except NeverAccepted:
        assert not can_be_written(content)
        return
    if b"delivery-status" not in content:  # all of which counts as fields, whatever it is
        assert (result is message) == can_be_written(content)
    assert can_be_written(text(result))
    assert text(result).translate(None, b" \x0b\x0c\x1c\x1d\x1e") == content.translate(None, b" \x0b\x0c\x1c\x1d\x1e")
