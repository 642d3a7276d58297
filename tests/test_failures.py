"""Mail that failed inside Zulip: handed over again once, never twice, never lost."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from email_gateway.failures import Failures
from email_gateway.verdict import Deferred, Delivered, Refused, Trouble
from test_gateway import CHANNEL


def line(*mails: bytes, recipient: str = CHANNEL) -> str:
    entries = [{"rcpt_to": recipient, "msg_base64": base64.b64encode(one).decode().rstrip("=")} for one in mails]
    return f"Mon Nov 23 02:38:00 2026\t{json.dumps(entries)}\n"


def write(gateway, text: str) -> None:
    with gateway.config.queue_errors.open("a") as file:
        file.write(text)


def handed(gateway) -> list[bytes]:
    return [message for _, message in gateway.handed]


def kept(gateway) -> list[tuple[bytes, bool]]:
    return [(b"".join(gateway.quarantine.pieces(copy.id)), copy.lost) for copy in gateway.journal.copies()]


@pytest.fixture
def failures(gateway):
    """With a file that was there before the installation."""
    write(gateway, line(b"before the installation"))
    made = Failures(gateway)
    assert made.run() == []
    return made


def test_each_is_handed_over_once_and_kept_when_it_fails_twice(gateway, failures):
    write(gateway, line(b"one") + line(b"two"))
    for _ in range(2):
        failures.run()
    assert handed(gateway) == [b"one", b"two"]
    write(gateway, line(b"two"))
    failures.run()
    assert handed(gateway) == [b"one", b"two"] and kept(gateway) == [(b"two", True)]
    assert gateway.journal.counts()["failed inside zulip"] == {"handed over again": 2, "quarantined": 1}


def test_a_mail_is_known_again_by_what_its_sender_wrote(gateway, failures):
    """Zulip 11's server adds fields, X-Peer with another port each time."""
    for port in (b"40001", b"40002"):
        write(gateway, line(b"Subject: S\nX-Peer: ('127.0.0.1', " + port + b")\n\none"))
        failures.run()
    assert handed(gateway) == [b"Subject: S\n\none"] and kept(gateway) == [(b"Subject: S\n\none", True)]


def test_what_zulip_will_not_take_any_more_is_kept_for_good(gateway, failures):
    """The channel is gone since, or the mail domain: nobody was told, and nothing behind waits."""
    gateway.answers = [Refused("5.1.1", "unknown address", "no"), Delivered()]
    write(gateway, line(b"one") + line(b"two", recipient=CHANNEL.replace("mail.", "former.")) + line(b"three"))
    failures.run()
    assert handed(gateway) == [b"one", b"three"] and kept(gateway) == [(b"one", True), (b"two", True)]


def test_what_cannot_be_read_is_said(gateway, failures, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(gateway.config.queue_errors), "stat", denied)
    with pytest.raises(Trouble, match=r"cannot read .*email_mirror.errors: Permission denied"):
        failures.run()


def test_it_goes_on_where_it_was_interrupted(gateway, failures):
    """Between two mails of a line, by trouble that passes or by a kill: none is handed over twice."""
    write(gateway, line(b"one", b"two", b"three"))
    gateway.answers = [
        Delivered(),
        Deferred("4.3.2", "HTTP 502", "down"),
        Delivered(),
        KeyboardInterrupt(),
        Delivered(),
    ]
    with pytest.raises(Trouble, match="down"):
        failures.run()
    with pytest.raises(KeyboardInterrupt):
        failures.run()
    for _ in range(2):
        failures.run()
    assert handed(gateway) == [b"one", b"two", b"two", b"three", b"three"] and kept(gateway) == []


def test_killed_before_its_place_is_noted_nothing_comes_twice(gateway, failures, monkeypatch):
    """Neither handed over again nor taken for a second failure."""
    write(gateway, line(b"one") + line(b"torn")[:90] + line(b"two"))
    monkeypatch.setattr(failures, "_write", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            failures.run()
    monkeypatch.undo()
    assert len(gateway.journal.copies()) <= 1


def test_a_new_file_is_taken_up_and_no_half_line(gateway, failures):
    path = gateway.config.queue_errors
    path.rename(path.with_suffix(".1"))
    write(gateway, line(b"new") + "not a line of Zulip's\nMon Nov\t[{")
    failures.run()
    assert handed(gateway) == [b"new"]


def test_a_torn_line_swallows_no_other(gateway, failures):
    """The disk was full: the beginning of one mail, and behind it, in the same line, the next."""
    whole = line(b"Subject: torn\n\n" + b"text " * 100)
    write(gateway, whole[:300] + line(b"one") + whole[:20] + line(b"two"))
    failures.run()
    assert handed(gateway) == [b"one", b"two"]
    [(torn, lost)] = kept(gateway)
    assert lost and (b"Subject: torn\n\n" + b"text " * 100).startswith(torn) and len(torn) > 100


def test_two_runs_at_the_same_time_are_not_needed_any_more():
    """The service is the only one that reads the file."""
    cli = (Path(__file__).parents[1] / "files/email_gateway/email_gateway/cli.py").read_text()
    assert "Failures" not in cli and "recover" not in cli
