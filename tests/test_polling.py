"""One round through an inbox: what leaves it, what stays, and what does not stop the rest."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import pytest
from email_gateway.addresses import Pattern
from email_gateway.config import Imap
from email_gateway.imap_session import Declined
from email_gateway.polling import MAX_WAIT, Inbox, Stopped
from email_gateway.verdict import Deferred, Delivered, Refused, Trouble, Verdict
from mails import spool
from test_addresses import TOKEN
from test_config import make_config

CHANNEL = f"zulip+general.{TOKEN}@example.com"
REPLY = f"zulip+mm{TOKEN}@example.com"
LATER = Deferred("4.3.2", "HTTP 502", "later")
NO_ROOM = Deferred("4.7.28", "rate limit", "later")


class Folder:
    """A folder as ImapSession shows it: recipients by UID."""

    identity = "zulip@example.com imap.example.com INBOX 7"

    def __init__(self, *recipients: str) -> None:
        self.mails = dict(enumerate(recipients, 1))
        self.failed: list[int] = []
        self.full = False

    def uids(self) -> list[int]:
        return sorted(self.mails)

    def header(self, uid: int) -> bytes | None:
        return f"To: {self.mails[uid]}\n".encode() if uid in self.mails else None

    def message(self, uid: int, file: BinaryIO) -> int | None:
        header = self.header(uid)
        return header and file.write(header + b"\nHello")

    def remove(self, uid: int) -> None:
        del self.mails[uid]

    def set_aside(self, uid: int) -> None:
        if self.full:
            raise Declined("4.4.2", "IMAP declined", "over quota")
        del self.mails[uid]
        self.failed.append(uid)


class Service:
    """Answers with .answers in turn, the last again and again; remembers what it was handed."""

    def __init__(self) -> None:
        self.answers: list[object] = [Delivered()]
        self.handed: list[str] = []
        self.known: set[tuple[str, int]] = set()

    def deliver(self, file: BinaryIO, max_wait: float, recipient: str, inbox: str, uid: str) -> Verdict:
        file.seek(0)
        assert file.read().endswith(b"\nHello") and max_wait == MAX_WAIT
        self.handed.append(recipient)
        answer = self.answers[0] if len(self.answers) == 1 else self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        verdict = answer(int(uid)) if callable(answer) else answer
        if isinstance(verdict, Delivered):
            self.known.add((inbox, int(uid)))
        return verdict

    def delivered(self, inbox: str, uids: list[int]) -> set[int]:
        return {uid for uid in uids if (inbox, uid) in self.known}


@pytest.fixture
def inbox(tmp_path: Path) -> Inbox:
    imap = Imap("imap.example.com", 993, "implicit", "INBOX", "zulip@example.com", "", "", {"password": "x"})
    config = make_config(tmp_path, pattern=Pattern("zulip+", "example.com"), imap=imap)
    made = Inbox(config, Service(), spool(tmp_path))
    made.service = made._service
    return made


def test_another_inbox_has_the_same_uids(inbox):
    """What Zulip accepted from the former one says nothing about this one's mail."""
    inbox.service.known.add(("zulip@example.org imap.example.org INBOX 7", 1))
    folder = Folder(CHANNEL)
    inbox.take_all(folder)
    assert inbox.service.handed == [CHANNEL] and folder.mails == {}


def test_what_is_accepted_leaves_the_inbox(inbox):
    folder = Folder(CHANNEL, REPLY)
    assert inbox.take_all(folder)[1:] == (2, 0, False)
    assert folder.mails == {} and folder.failed == [] and inbox.service.handed == [CHANNEL, REPLY]


def test_what_was_accepted_before_a_crash_is_only_removed(inbox):
    folder = Folder(CHANNEL, CHANNEL)
    inbox.service.known.add((Folder.identity, 1))
    assert inbox.take_all(folder)[1:] == (2, 0, False)
    assert len(inbox.service.handed) == 1


def test_what_cannot_be_posted_is_set_aside_and_the_rest_goes_on(inbox):
    inbox.service.answers = [Refused("5.1.1", "unknown address", "no"), Delivered()]
    folder = Folder(CHANNEL, "nobody@example.org", CHANNEL)
    assert inbox.take_all(folder).left == 0
    assert folder.failed == [1, 2] and len(inbox.service.handed) == 2


def test_our_own_bug_holds_up_one_mail_only(inbox):
    inbox.service.answers = [ZeroDivisionError("bug"), Delivered()]
    folder = Folder(CHANNEL, CHANNEL)
    assert inbox.take_all(folder)[1:] == (1, 1, False)
    assert list(folder.mails) == [1]


def test_what_cannot_be_set_aside_does_not_hold_up_the_rest(inbox):
    folder = Folder("nobody@example.org", CHANNEL)
    folder.full = True
    assert inbox.take_all(folder)[1:] == (1, 1, False)
    assert list(folder.mails) == [1]


def test_a_zulip_that_is_down_is_not_asked_for_every_mail(inbox):
    inbox.service.answers = [LATER]
    folder = Folder(*[CHANNEL] * 50)
    assert inbox.take_all(folder)[1:] == (0, 50, False)
    assert len(inbox.service.handed) == 3


def test_mails_that_zulip_cannot_take_do_not_hold_up_those_behind(inbox):
    inbox.service.answers = [LATER, LATER, LATER, Delivered()]
    folder = Folder(*[CHANNEL] * 5)
    assert inbox.take_all(folder)[1:] == (0, 5, False)
    inbox.service.answers = [Delivered(), Delivered(), LATER]
    assert inbox.take_all(folder)[1:] == (2, 3, False)
    assert list(folder.mails) == [1, 2, 3]


def test_asked_to_stop_it_ends_between_two_mails(inbox, monkeypatch):
    folder = Folder(CHANNEL, CHANNEL)
    remove = folder.remove
    monkeypatch.setattr(folder, "remove", lambda uid: (inbox._on_sigterm(), remove(uid)))
    with pytest.raises(Stopped):
        inbox.take_all(folder)
    assert list(folder.mails) == [2]


def test_replies_pass_what_waits_for_room(inbox):
    inbox.service.answers = [Delivered(), NO_ROOM, Delivered()]
    folder = Folder(CHANNEL, CHANNEL, CHANNEL, REPLY, CHANNEL)
    assert inbox.take_all(folder)[1:] == (2, 3, True)
    assert inbox.service.handed == [CHANNEL, CHANNEL, REPLY]


def test_a_flooded_channel_does_not_hold_up_another(inbox):
    """Its own mail keeps its order."""
    other = CHANNEL.replace(TOKEN, TOKEN[::-1])
    inbox.service.answers = [lambda uid: NO_ROOM if uid < 4 else Delivered()]
    folder = Folder(CHANNEL, CHANNEL, CHANNEL, other, CHANNEL, other)
    assert inbox.take_all(folder)[1:] == (2, 4, True)
    assert inbox.service.handed == [CHANNEL, other, other]


def test_a_reply_that_comes_meanwhile_does_not_wait_for_the_rest(inbox, monkeypatch):
    folder = Folder(*[CHANNEL] * 5)
    remove = folder.remove
    monkeypatch.setattr(folder, "remove", lambda uid: (remove(uid), uid == 1 and folder.mails.update({6: REPLY})))
    assert inbox.take_all(folder)[1:] == (6, 0, False)
    assert inbox.service.handed == [CHANNEL, REPLY, *[CHANNEL] * 4]


def test_mails_that_always_fail_do_not_starve_others_that_wait(inbox, monkeypatch):
    """After an outage all wait; three of them are poison."""
    folder = Folder(*[CHANNEL] * 8)
    inbox.service.answers = [LATER]
    for _ in range(3):
        inbox.take_all(folder)
    poison = {1, 2, 3}
    inbox.service.answers = [lambda uid: LATER if uid in poison else Delivered()]
    for _ in range(3):
        inbox.take_all(folder)
    assert set(folder.mails) == poison


def test_what_was_accepted_and_cannot_be_removed_does_not_hold_up_the_rest(inbox, monkeypatch):
    folder = Folder(CHANNEL, CHANNEL)
    remove = folder.remove

    def declines(uid):
        if uid == 1:
            raise Declined("4.4.2", "IMAP declined", "read only")
        remove(uid)

    monkeypatch.setattr(folder, "remove", declines)
    for _ in range(2):
        inbox.take_all(folder)
    inbox._stuck.clear()  # the next session
    inbox.take_all(folder)
    assert list(folder.mails) == [1] and len(inbox.service.handed) == 2


@pytest.mark.parametrize("part", ["header", "message"])
def test_a_mail_that_breaks_the_session_comes_last_in_the_next(inbox, monkeypatch, part):
    folder = Folder(CHANNEL, CHANNEL, CHANNEL)
    read = getattr(folder, part)

    def hangs_up(uid, *more):
        if uid == 1:
            raise Trouble("4.4.2", "IMAP session", "the session broke")
        return read(uid, *more)

    monkeypatch.setattr(folder, part, hangs_up)
    for _ in range(2):
        with pytest.raises(Trouble):
            inbox.take_all(folder)
    assert list(folder.mails) == [1] and len(inbox.service.handed) == 2
