"""Mail that may write lines of its own into Zulip's log is known, however it hides them."""

from __future__ import annotations

import email
import email.policy
import threading
import time

import pytest
from bombs import BOMBS
from email_gateway import outcome
from email_gateway.forgery import may_forge
from email_gateway.gateway import Envelope
from email_gateway.message import Message
from email_gateway.verdict import Deferred, Delivered, Refused
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mails import POSTED, mail
from test_outcome import CHANNEL, FAILS, FROM_POSTFIX, REPLY, TO_GENERAL, after, is_waiting

FORGED = [
    b"Content-Disposition: attachment; filename*=utf-8''a%0Ab",
    b"Content-Disposition: attachment; filename*0*=utf-8''a%0; filename*1*=Ab",
    b"Content-Disposition: attachment; filename *0* \t=utf-8''a%0Ab",
    b'Content-Type: text/plain; name="=?utf-8?q?a=0Ab?="',
    b'Content-Type: text/plain; name="=?UTF-8*en?Q?a=0ab?="',
    b"From: =?utf-8?b?YQpi?= <a@example.org>",
    b"From: =?utf-8?B?YQ pi=?= <a@example.org>",
    b"From: =?utf-16?q?=0A=00?= <a@example.org>",
    b"From: =?utf-7?q?+AAo-?= <a@example.org>",
    b"From: =?unicode_escape?q?=5Cn?= <a@example.org>",
    b"From: =?x?=?utf-8?q?=0A?= <a@example.org>",
    b"From: =?utf-8?q?a=?utf-8?q?=0A?= <a@example.org>",
    b"From: =?" + b"x" * 200 + b"?q?=0A?= <a@example.org>",
    b"From: =?utf-8?q?" + b"x" * 50_000 + b"=0A?= <a@example.org>",
]
HARMLESS = [
    b"From: =?utf-8?q?J=C3=B6rg?= <a@example.org>",
    b"From: =?utf-8?B?SsO2cmc=?= <a@example.org>",
    b"Subject: =?iso-2022-jp?B?GyRCRnxLXBsoQg==?=",
    b"Subject: what=?",
    b"Subject: ***, 2*3 is 6",
]
WORST = Envelope(CHANNEL, known_by=("postfix", "QID", CHANNEL))


@pytest.mark.parametrize("field", FORGED)
def test_a_line_end_is_found(field):
    assert may_forge(mail(b"Subject: x\n" + field + b"\n\ntext\n"))
    # Also across the pieces that it is read in.
    for place in range(49152 - 60, 49152, 7):
        assert may_forge(mail(b"x" * place + b"\n" + field + b"\n\ntext\n"))


@pytest.mark.parametrize("field", HARMLESS)
def test_ordinary_mail_goes_with_others(field):
    assert not may_forge(mail(b"Subject: x\n" + field + b"\n\ntext\n"))


@given(
    st.lists(st.sampled_from(sorted({bytes([octet]) for octet in b"=?*%0aAqQbB:;'\"8- \tnu"} | {b"=?utf-8?q?", b"?="})))
)
@example([b"=?u?q?", b"=0A", b"?="])
@settings(max_examples=300, deadline=None)
def test_whatever_python_decodes_to_a_line_end_is_found(pieces):
    value = b"".join(pieces)
    for field in (
        b"From: %s",
        b'Content-Disposition: attachment; filename="%s"',
        b"Content-Disposition: a; filename%s",
    ):
        text = b"X: y\n" + field % value + b"\n\n"
        found = email.message_from_bytes(text, policy=email.policy.default)
        try:
            decoded = [str(found["From"]), str(found.get_filename())]
        except Exception:  # Zulip fails with it as well
            continue
        assert not any("\n" in one for one in decoded) or may_forge(mail(text)), decoded


@pytest.mark.parametrize("name", BOMBS)
def test_it_takes_little_time(tmp_path, name):
    with open(tmp_path / "mail", "w+b") as file:
        file.writelines(BOMBS[name]())
        file.flush()
        started = time.process_time()
        may_forge(Message(file))
        assert time.process_time() - started < 0.5


@pytest.mark.parametrize("unit", [b"=?", b"=?utf-8?q?a?=", b"* ", b"*1", b"=?u?q?=0", b"=?utf-8?b?YWE=?="])
def test_nor_does_a_mail_of_nothing_else(unit):
    whole = mail(unit * (18_000_000 // len(unit)))
    started = time.process_time()
    may_forge(whole)
    assert time.process_time() - started < 0.5


# --- What is done with it

FORGERY = mail(b"Content-Disposition: attachment; filename*=utf-8''a%0Ab\n\ntext\n")


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(outcome, "_SETTLES", 0.1)


@pytest.mark.parametrize(
    ("tells", "kind"),
    [
        ([TO_GENERAL, "Email has no nonempty body sections; ignoring."], Refused),
        (["Email has no nonempty body sections; ignoring.", TO_GENERAL], Delivered),
        ([TO_GENERAL, FAILS], Deferred),
        ([FAILS, TO_GENERAL], Delivered),
        ([TO_GENERAL] * 700 + ["Sending user is not active."] * 3 + [TO_GENERAL], Delivered),
    ],
)
def test_the_last_line_counts_and_no_other(gateway, tells, kind):
    gateway.tells = tells
    assert isinstance(gateway.deliver(WORST, FORGERY), kind)
    assert len(gateway.pace.look()) == 1  # it takes no more of Zulip's limit than it has used


def test_meanwhile_nothing_else_is_handed_over(gateway):
    """So its lines are about no other mail."""
    gateway.tells = []
    after(0.05, "Sending user is not active. Ignoring this message notification email.", gateway=gateway)
    after(0.1, TO_GENERAL, gateway=gateway)
    verdicts = []

    def reply() -> None:
        while not gateway.handed:
            time.sleep(0.01)
        gateway.tells = None
        verdicts.append(gateway.deliver(Envelope(REPLY), mail(b"a reply")))

    thread = threading.Thread(target=reply)
    thread.start()
    assert gateway.deliver(WORST, FORGERY) == POSTED
    thread.join()
    assert verdicts == [POSTED]


def test_it_waits_for_what_is_under_way(gateway):
    gateway.tells = []
    assert is_waiting(gateway.deliver(Envelope(REPLY), mail(b"a reply")))
    verdict = gateway.deliver(FROM_POSTFIX, FORGERY, max_wait=0.2)
    assert isinstance(verdict, Deferred) and "has not consumed them" in verdict.reason
    assert len(gateway.handed) == 1
