"""Mail that failed inside Zulip: handed over again once, never twice, never lost."""

from __future__ import annotations

import base64
import json
import tracemalloc

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
    assert made.run() == ([], None)
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


def test_a_question_that_failed_is_nothing_to_hand_over(gateway, failures):
    """Nor does it hide the failure of another's mail for that address."""
    write(gateway, line(b""))
    assert failures.run() == ([], None) and handed(gateway) == []
    write(gateway, line(b"one"))
    failures.run()
    assert handed(gateway) == [b"one"]


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
    assert failures.run()[1].reason == "down"
    with pytest.raises(KeyboardInterrupt):
        failures.run()
    gateway.outcomes.after_a_start()
    for _ in range(2):
        failures.run()
    assert handed(gateway) == [b"one", b"two", b"three", b"two", b"two"] and kept(gateway) == []


def test_one_that_zulip_does_not_take_now_holds_up_no_other(gateway, failures):
    write(gateway, line(b"one") + line(b"two"))
    gateway.answers = [
        Deferred("4.3.2", "HTTP 500", "no"),
        Delivered(),
        Deferred("4.3.2", "HTTP 500", "no"),
        Delivered(),
    ]
    for _ in range(3):
        failures.run()
    assert handed(gateway) == [b"one", b"two", b"one", b"one"]


def test_what_waits_outlives_the_journal(gateway, failures):
    write(gateway, line(b"one"))
    gateway.answers = [Deferred("4.3.2", "HTTP 502", "down"), Delivered()]
    failures.run()
    for path in gateway.config.state_dir.glob("journal*"):
        path.unlink()
    with gateway.journal.change() as database:
        gateway.journal.write_note(database, "consumption unknown", None)
    failures.run()
    assert handed(gateway) == [b"one", b"one"]


def test_the_same_mail_at_the_same_place_of_an_emptied_file_has_failed_twice(gateway, failures):
    for _ in range(2):
        gateway.config.queue_errors.write_text("")
        failures.run()
        write(gateway, line(b"one"))
        failures.run()
    assert handed(gateway) == [b"one"] and kept(gateway) == [(b"one", True)]


def test_the_last_lines_of_a_rotated_file_are_not_lost(gateway, failures):
    path = gateway.config.queue_errors
    write(gateway, line(b"one"))
    path.rename(path.with_name(f"{path.name}.1"))
    write(gateway, line(b"two"))
    failures.run()
    assert handed(gateway) == [b"one", b"two"]


def test_it_holds_no_mail_in_memory(gateway, failures):
    write(gateway, line(b"text " * 1_000_000))
    gateway.answers = [Deferred("4.3.2", "HTTP 502", "down")]
    tracemalloc.start()
    failures.run()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # The stand-in for Zulip of this test reads the 5 MB itself: once, and joined.
    assert peak < 2**20 * 12


def test_killed_before_its_place_is_noted_nothing_comes_twice(gateway, failures, monkeypatch):
    """Neither handed over again nor taken for a second failure."""
    write(gateway, line(b"one") + line(b"torn")[:90] + line(b"two"))
    monkeypatch.setattr(failures, "_write_position", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
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
