"""A mail that is sent to see whether mail works."""

from __future__ import annotations

import re
import socket
import threading

import pytest
from aiosmtpd.controller import Controller
from email_gateway import cli, probe
from email_gateway.gateway import Envelope
from email_gateway.verdict import Deferred, Delivered, Refused
from mails import mail
from test_gateway import CHANNEL


class Postfix:
    """Accepts a mail and brings it to the gateway, soon."""

    def __init__(self, gateway) -> None:
        self.gateway, self.answer = gateway, "250 2.0.0 Ok: queued as ABC123"
        self.mails: list[bytes] = []

    async def handle_DATA(self, _server, _session, envelope):
        self.mails.append(envelope.original_content)
        if self.answer.startswith("250"):
            brought = Envelope(envelope.rcpt_tos[0], envelope.mail_from, "ABC123", "postfix", ("postfix", "ABC123"))
            threading.Timer(0.1, lambda: self.gateway.deliver(brought, mail(self.mails[-1]))).start()
        return self.answer


@pytest.fixture
def postfix(gateway, monkeypatch):
    made = Postfix(gateway)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    controller = Controller(made, hostname="127.0.0.1", port=port)
    controller.start()
    monkeypatch.setattr(probe, "PORT_25", ("127.0.0.1", port))
    yield made
    controller.stop()


def told(gateway, patience=10.0):
    lines: list[str] = []
    sent = probe.send(gateway.config, CHANNEL, lines.append)
    return None if sent is None else probe.follow(gateway.config, sent, lines.append, patience), lines


def test_posted(gateway, postfix):
    seconds, lines = told(gateway)
    assert seconds is not None and seconds >= 0.1
    assert re.fullmatch(r"Postfix has accepted it after \d+\.\d\d s, as ABC123", lines[0])
    assert lines[-1].startswith("Posted in Zulip after ")
    assert gateway.handed[0][0] == CHANNEL and b"Subject: Email gateway: probe" in postfix.mails[0]


def test_refused_at_once(gateway, postfix):
    postfix.answer = "550 5.7.1 no"
    assert told(gateway) == (None, ["Port 25 has not taken it: 550 5.7.1 no"])


def test_refused_by_zulip(gateway, postfix):
    gateway.answers = [Refused("5.7.1", "not allowed", "the channel is closed")]
    seconds, lines = told(gateway)
    assert seconds is None and "refused" in lines[-1] and lines[-1].endswith(": the channel is closed")


def test_it_waits(gateway, postfix):
    gateway.answers = [Deferred("4.3.2", "down", "Zulip does not answer")]
    seconds, lines = told(gateway, 1.0)
    assert seconds is None and "has not been posted within 1 s; last it was told to wait: Zulip does not" in lines[-1]


def test_a_queue_id_that_was_another_mails_before(gateway, postfix):
    gateway.deliver(Envelope(CHANNEL, "", "ABC123", "postfix", ("postfix", "before")), mail(b"before"))
    gateway.answers = [Deferred("4.3.2", "down", "Zulip does not answer")]
    assert told(gateway, 1.0)[0] is None


def test_dropped_is_not_posted(gateway, postfix):
    gateway.tells = ["Skipping reply to user 9: automatic"]
    seconds, lines = told(gateway, 1.0)
    assert seconds is None, lines


@pytest.fixture
def timed(gateway, postfix, monkeypatch, tmp_path):
    """The timer's command; what it prints, its status, and what is noted of it."""
    book = gateway.config.addresses._replace(probe=CHANNEL)
    gateway.config = gateway.config._replace(addresses=book)
    monkeypatch.setattr(cli.config, "load", lambda _: gateway.config)
    monkeypatch.setattr(cli, "_become_owner", lambda _: None)

    class Service:
        def ask(self, verb, **fields):
            number, seconds = int(fields["after"]), fields["seconds"]
            note = {"at": float(fields["at"]), "queue_id": fields["queue-id"], "after": number}
            note |= {"seconds": float(seconds) if seconds else None, "looked": float(fields["looked"])}
            with gateway.journal.change() as database:
                gateway.journal.write_note(database, verb.removesuffix("d"), note)
            return 0, "noted", ""

    monkeypatch.setattr(cli, "Client", lambda _: Service())
    return lambda wait="10": cli.main(["probe", "--timed", "--wait", wait])


def test_while_one_waits_no_other_is_sent(gateway, postfix, timed, capsys):
    gateway.answers = [Deferred("4.3.2", "down", "Zulip does not answer")]
    assert timed("0.5") == timed("0.5") == 1
    assert (
        len(postfix.mails) == 1
        and "ABC123, has not been posted yet, so that no other is sent" in capsys.readouterr().out
    )
    gateway.answers = [Delivered()]
    brought = Envelope(
        CHANNEL, f"postmaster@{gateway.config.pattern.domain}", "ABC123", "postfix", ("postfix", "ABC123")
    )
    gateway.deliver(brought, mail(postfix.mails[0]))
    note = gateway.journal.note("probe")
    assert note["seconds"] is None and note["queue_id"] == "ABC123"
    assert timed() == 0 and len(postfix.mails) == 2
    assert gateway.journal.note("probe")["seconds"] > 0


def test_no_port_25(gateway, monkeypatch):
    monkeypatch.setattr(probe, "PORT_25", ("127.0.0.1", 1))
    seconds, lines = told(gateway)
    assert seconds is None and "Port 25 has not taken it: " in lines[0] and "refused" in lines[0]
