"""Automatic replies and loops."""

from __future__ import annotations

import pytest
from email_gateway.gateway import Envelope
from email_gateway.verdict import Delivered, Refused
from mails import POSTED, mail
from test_addresses import TOKEN
from test_gateway import CHANNEL, FROM_POSTFIX, REPLY

DOMAIN = "mail.example.com"
TO_REPLY = FROM_POSTFIX._replace(recipient=REPLY, known_by=("postfix", "QID", REPLY))


def with_field(field: str) -> bytes:
    return f"Subject: x\r\n{field}\r\nTo: y\r\n\r\nPrecedence: bulk\r\n".encode()


@pytest.mark.parametrize(
    "field",
    [
        "Auto-Submitted: auto-replied",
        "auto-submitted:auto-generated; owner-email=x",
        "Auto-Submitted:\r\n auto-notified",
        "Precedence: bulk",
        "Precedence: junk",
        "Precedence: auto_reply",
        "X-Auto-Response-Suppress: All",
        "X-Autoreply: yes",
        "Return-Path: <>",
    ],
)
def test_an_automatic_reply_is_accepted_dropped_and_counted(gateway, field):
    verdict = gateway.deliver(TO_REPLY, mail(with_field(field)))
    assert isinstance(verdict, Delivered) and verdict.cause == "dropped" and gateway.handed == []
    assert gateway.journal.counts() == {"delivered": {"dropped": 1}}
    # Machines may write to channels.
    assert gateway.deliver(FROM_POSTFIX, mail(with_field(field))) == POSTED
    gateway.config = gateway.config._replace(post_automatic=True)
    assert gateway.deliver(TO_REPLY, mail(with_field(field) + b"more")) == POSTED


@pytest.mark.parametrize(
    "field",
    [
        "Auto-Submitted: no",
        "auto-submitted: No; x",
        "Precedence: list",
        "X-Auto: y",
        "Return-Path: <a@x>",
        "X: no\r\n y",
    ],
)
def test_what_a_human_writes_is_posted(gateway, field):
    assert gateway.deliver(TO_REPLY, mail(with_field(field))) == POSTED


def test_the_null_sender_is_a_machine(gateway):
    assert gateway.deliver(TO_REPLY._replace(sender=""), mail(b"m")).cause == "dropped"
    assert gateway.deliver(Envelope(REPLY), mail(b"m")) == POSTED  # by hand: there is no envelope


@pytest.mark.parametrize("reply_to", [f"Zulip <mm{TOKEN}@{DOMAIN}>", f'"x"\r\n <MM{TOKEN}@{DOMAIN.upper()}>'])
def test_zulips_own_notification_does_not_come_back(gateway, reply_to):
    text = with_field(f"Reply-To: {reply_to}")
    verdict = gateway.deliver(FROM_POSTFIX, mail(text))
    assert isinstance(verdict, Refused) and verdict.cause == "loop" and "Zulip itself has sent" in verdict.reason
    assert gateway.deliver(TO_REPLY, mail(text)) == POSTED
    assert gateway.deliver(FROM_POSTFIX, mail(text.replace(b"Reply-To", b"X-To"))) == POSTED


@pytest.mark.parametrize(("passes", "is_loop"), [(4, True), (3, False)])
def test_what_goes_in_circles_is_refused(gateway, passes, is_loop):
    """The passage of now is noted as well."""
    received = b"Received: from a (b [1.2.3.4])\r\n\tby mail.example.com (Postfix) with ESMTP id x\r\n\tfor <x>\r\n"
    verdict = gateway.deliver(Envelope(CHANNEL), mail(received * passes + b"Received: by other.example.com\r\n\r\nm"))
    assert isinstance(verdict, Refused) == is_loop
    assert not is_loop or "passed through this mail server 3 times before" in verdict.reason
