"""Mail that would write lines of its own into Zulip's log is refused, however it hides them."""

from __future__ import annotations

import email
import email.policy
import time

import pytest
from email_gateway import forgery
from email_gateway.forgery import forged
from email_gateway.verdict import Refused
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mails import POSTED, mail
from test_outcome import FROM_POSTFIX

FORGED = [
    b"Content-Disposition: attachment; filename*=utf-8''a%0Ab",
    b'Content-Type: text/plain; name="=?utf-8?q?a=0Ab?="',
    b"Content-Type: text/plain;\r\n name*=utf-8''a%0Ab",
    b"content-disposition: attachment;\r\tfilename*=utf-8''a%0Ab",
    b"From: =?utf-8?b?YQpi?= <a@example.org>",
    b"From: =?utf-16?q?=0A=00?= <a@example.org>",
    b"From: =?utf-7?q?+AAo-?= <a@example.org>",
    b"From: a =?utf-8?q?=0A?= <a@example.org>",
    b"Message-ID: =?utf-8?q?a=0Ab?=",
    # Decoded, and then taken apart once more.
    b'Content-Disposition: attachment; a="x\\\\"; b="; filename*\\=utf-8\'\'x%0AFORGED"',
    b'Content-Disposition: attachment; a="x\\\\"; b="=?utf-8?q?;_filename=2A=3Dutf-8\'\'x=250AFORGED?="',
]
HARMLESS = [
    b"From: =?utf-8?q?J=C3=B6rg?= <a@example.org>",
    b"From: =?utf-8?B?SsO2cmc=?= <a@example.org>",
    b"Subject: =?utf-8?q?a=0Ab?=",
    b"Content-Disposition: attachment; filename*=utf-8''J%C3%B6rg.pdf",
    b'Content-Type: text/plain; name="=?utf-8?q?J=C3=B6rg?="',
]


@pytest.mark.parametrize("field", FORGED)
def test_a_line_end_is_found(field):
    assert "has a line end" in forged(mail(field + b"\n\ntext\n"))
    # In any part, and across the pieces that it is read in.
    for place in range(49152 - 90, 49152, 7):
        assert forged(mail(b"x" * place + b"\r\n" + field + b"\r\n\r\ntext\n"))


@pytest.mark.parametrize("field", HARMLESS)
def test_ordinary_mail_is_none(field):
    assert forged(mail(b"Subject: x\n" + field + b"\n\ntext\n")) == ""
    assert forged(mail(b"Subject: x\n" + (field + b"\r\n") * 300 + b"\n\ntext\n")) == ""
    assert forged(mail(b"x" * 49140 + b"\n" + field + b"\n\n" + b"x" * 100_000)) == ""


def test_a_field_without_end_is_none_of_an_honest_mail():
    assert forged(mail(b"From: =?utf-8?q?" + b"x" * 50_000 + b"?=\n\n")) == "its field From is longer than 4096 octets"
    assert forged(mail(b"From: " + b"x" * 50_000 + b"\n\n")) == ""


PIECES = [
    *(bytes([octet]) for octet in b"=?*%0aAqQbB:;'\"\\8- \tnu"),
    b"=?utf-8?q?",
    b"?=",
    b"=0A",
    b"%0A",
    b'"; b="',
    b"filename*=",
]


@given(st.lists(st.sampled_from(PIECES)))
@example([b"=?utf-8?q?", b"=0A", b"?="])
@settings(max_examples=300, deadline=None)
def test_whatever_zulip_decodes_to_a_line_end_is_found(pieces):
    value = b"".join(pieces)
    for field in (b"From: %s", b'Content-Disposition: a; filename="%s"', b'Content-Disposition: a; a="x\\\\"; b="%s"'):
        text = (
            b"X: y\nContent-Type: multipart/mixed; boundary=b\n"
            + field % value
            + b"\n\n--b\n"
            + field % value
            + b"\n\nx\n"
        )
        found = email.message_from_bytes(text, policy=email.policy.default)
        try:
            decoded = [str(part["From"]) + str(part.get_filename()) for part in found.walk()]
        except Exception:  # Zulip fails with it as well
            continue
        assert not any("\n" in one for one in decoded) or forged(mail(text)), decoded


FIELD = b"From: =?utf-8?q?a?= %s\n"


@pytest.mark.parametrize(
    "unit",
    [
        *(b"=?", b"* ", b"From: \n", b"From: =?\n", b"From: *\n *\n", b"\r", b"From:\n\n*", FIELD % b"a"),
        *(FIELD % (body * 4000)[:4000] for body in (b'"', b"(a)", b"(", b"a;", b"=?u?q?a?= ", b"<", b"\\", b"a@b,")),
        *(
            b"Content-Type: a; *" + (body * 4000)[:4000] + b"\n"
            for body in (b'"', b"(a)", b"a;", b'a="x";', b"a*0*=b;")
        ),
    ],
)
def test_a_mail_of_one_thing_takes_little_time(monkeypatch, unit):
    """All but the time for what Python reads, which is limited (here to less)."""
    most, limit = 1 - forgery._MOST_SECONDS, 0.02
    monkeypatch.setattr(forgery, "_MOST_SECONDS", limit)
    whole = mail(b"\n" + unit * (18_000_000 // len(unit)))
    started = time.process_time()
    forged(whole)
    used = time.process_time() - started
    print(f"{used:.2f} s: {unit[:30]!r}")
    assert used <= most + limit


def test_it_never_reaches_zulip(gateway):
    text = b"Subject: x\nContent-Disposition: attachment; filename*=utf-8''a%0Ab\n\ntext\n"
    verdict = gateway.deliver(FROM_POSTFIX, mail(text))
    assert isinstance(verdict, Refused) and "what is encoded in its field Content-Disposition" in verdict.reason
    assert gateway.handed == [] and gateway.deliver(FROM_POSTFIX._replace(queue_id="R"), mail(b"m")) == POSTED
