"""One round through an inbox: what leaves it, what stays, and what does not stop the rest."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest
from email_gateway.address_book import AddressBook
from email_gateway.addresses import Pattern
from email_gateway.config import Imap
from email_gateway.imap_session import Declined, Seen
from email_gateway.polling import (
    BATCH,
    FEWEST_TRIES,
    GIVEN_UP,
    LEFT_ALONE,
    LIMIT_RETRY,
    MAX_WAIT,
    MOST_RECIPIENTS,
    RETRIES,
    WAITS,
    Inbox,
    Stopped,
)
from email_gateway.verdict import Deferred, Delivered, Refused, Trouble, Verdict
from mails import spool
from test_addresses import TOKEN
from test_config import make_config

CHANNEL = f"zulip+general.{TOKEN}@example.com"
OTHER = CHANNEL.replace(TOKEN, TOKEN[::-1])
REPLY = f"zulip+mm{TOKEN}@example.com"
LATER = Deferred("4.3.2", "HTTP 502", "later")
LIMITED = Deferred("4.7.28", "rate limit", "later")


class Folder:
    """A folder as ImapSession shows it: recipients by UID."""

    identity = "zulip@example.com imap.example.com INBOX 7"

    def __init__(self, *recipients: str) -> None:
        self.mails = dict(enumerate(recipients, 1))
        self.failed: list[int] = []
        self.full = False
        self.size = 1000
        self.asked: list[list[int]] = []

    def uids(self, after: int = 0) -> list[int]:
        return sorted(uid for uid in self.mails if uid > after)

    def header(self, uid: int) -> bytes:
        return f"To: {self.mails[uid]}\n".encode()

    def headers(self, uids: list[int]) -> dict[int, Seen]:
        self.asked.append(list(uids))
        return {uid: Seen(self.size, self.header(uid)) for uid in uids if uid in self.mails}

    def message(self, uid: int, file: BinaryIO, most: int, step: Callable[[], None]) -> int | None:
        return file.write(self.header(uid) + b"\nHello") if uid in self.mails else None

    def remove(self, uid: int) -> None:
        del self.mails[uid]

    def set_aside(self, uid: int, copies: object) -> None:
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
        self.asked: list[str] = []

    def ask(self, verb: str) -> None:
        self.asked.append(verb)

    def deliver(self, file: BinaryIO, max_wait: float, recipient: str, inbox: str, uid: str) -> Verdict:
        file.seek(0)
        assert file.read().endswith(b"\nHello") and max_wait == MAX_WAIT
        self.handed.append(recipient)
        answer = self.answers[0] if len(self.answers) == 1 else self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        verdict = answer(int(uid.split(" ", maxsplit=1)[0])) if callable(answer) else answer
        if isinstance(verdict, Delivered) and uid.isdecimal():
            self.known.add((inbox, int(uid)))
        return verdict

    def delivered(self, inbox: str, uids: list[int]) -> set[int]:
        return {uid for uid in uids if (inbox, uid) in self.known}


def remade(inbox: Inbox, tmp_path: Path) -> Inbox:
    """As after a restart, with the same state and service."""
    made = Inbox(inbox._config, inbox.service, spool(tmp_path))
    made.service = inbox.service
    return made


@pytest.fixture
def inbox(tmp_path: Path) -> Inbox:
    imap = Imap("imap.example.com", 993, "implicit", "INBOX", "zulip@example.com", "", "", 10**6, {"password": "x"})
    config = make_config(tmp_path, addresses=AddressBook(Pattern("zulip+", "example.com")), imap=imap)
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
    assert inbox.take_all(folder) == (2, 0, False)
    assert folder.mails == {} and folder.failed == [] and inbox.service.handed == [CHANNEL, REPLY]


def test_what_was_accepted_before_a_crash_is_only_removed(inbox):
    folder = Folder(CHANNEL, CHANNEL)
    inbox.service.known.add((Folder.identity, 1))
    assert inbox.take_all(folder) == (2, 0, False)
    assert len(inbox.service.handed) == 1


def test_what_cannot_be_posted_is_set_aside_and_the_rest_goes_on(inbox):
    inbox.service.answers = [Refused("5.1.1", "unknown address", "no"), Delivered()]
    folder = Folder(CHANNEL, CHANNEL)
    assert inbox.take_all(folder).left == 0
    assert folder.failed == [1] and len(inbox.service.handed) == 2


def test_what_is_not_for_zulip_stays_and_is_looked_at_once(inbox, tmp_path, capfd):
    folder = Folder("nobody@example.org", CHANNEL, "zulip+nothing@example.com", REPLY)
    assert inbox.take_all(folder) == (2, 0, False)
    assert sorted(folder.mails) == [1, 3] and folder.failed == []
    assert "2 mails are not for Zulip, and stay" in capfd.readouterr().out
    folder.mails[5] = CHANNEL
    another = remade(inbox, tmp_path)  # as after a restart
    assert another.take_all(folder) == (1, 0, False)
    assert sorted(folder.mails) == [1, 3] and folder.asked == [[1, 2, 3, 4], [5]]


def test_what_waits_before_what_is_not_for_zulip_is_found_after_a_restart(inbox, tmp_path):
    inbox.service.answers = [LATER]
    folder = Folder("nobody@example.org", CHANNEL, "nobody@example.org")
    inbox.take_all(folder)
    another = remade(inbox, tmp_path)
    another.service.answers = [Delivered()]
    assert another.take_all(folder) == (1, 0, False)
    assert sorted(folder.mails) == [1, 3]


def test_a_mail_to_two_channels_reaches_both(inbox):
    folder = Folder(f"{CHANNEL}, {OTHER}")
    assert inbox.take_all(folder) == (1, 0, False)
    assert inbox.service.handed == [CHANNEL, OTHER] and folder.mails == {} and folder.failed == []


def test_it_stays_until_it_has_reached_both(inbox):
    inbox.service.answers = [LIMITED, Delivered()]
    folder = Folder(f"{CHANNEL}, {OTHER}")
    assert inbox.take_all(folder) == (0, 1, True)
    assert inbox.service.handed == [CHANNEL, OTHER]  # the one that waits does not hold up the other
    assert inbox.take_all(folder) == (1, 0, False)
    assert folder.mails == {}


@pytest.mark.parametrize(
    "answers", [[Refused("5.1.1", "x", "no"), Delivered()], [Delivered(), Refused("5.1.1", "x", "no")]]
)
def test_one_that_is_refused_for_one_of_them_is_kept(inbox, answers, capfd):
    """And it is not taken for one that has only to be removed, should the session break meanwhile."""
    inbox.service.answers = answers
    folder = Folder(f"{CHANNEL}, {OTHER}")
    assert inbox.take_all(folder) == (1, 0, False)
    assert len(inbox.service.handed) == 2 and folder.failed == [1] and inbox.service.known == set()


def test_a_mail_to_more_addresses_than_anybody_needs_is_set_aside(inbox):
    addresses = [f"zulip+x.{number:032x}@example.com" for number in range(MOST_RECIPIENTS + 1)]
    folder = Folder(", ".join(addresses))
    assert inbox.take_all(folder) == (1, 0, False)
    assert folder.failed == [1] and inbox.service.handed == []


def test_what_is_too_large_is_set_aside_without_reading_it(inbox, capfd):
    folder = Folder(CHANNEL)
    folder.size = 10**6 + 1
    folder.message = None
    assert inbox.take_all(folder) == (1, 0, False)
    assert folder.failed == [1] and "it has 1000001 bytes, and Zulip takes at most 1000000" in capfd.readouterr().out


def test_headers_come_in_batches(inbox):
    folder = Folder(*[CHANNEL] * (2 * BATCH + 1))
    inbox.take_all(folder)
    assert [len(uids) for uids in folder.asked] == [BATCH, BATCH, 1] and folder.mails == {}


def test_a_mail_that_the_server_cannot_show_does_not_hold_up_its_batch(inbox, monkeypatch):
    folder = Folder(*[CHANNEL] * 5)
    headers = folder.headers

    def declines(uids):
        if 3 in uids:
            raise Declined("4.4.2", "IMAP declined", "cannot be read")
        return headers(uids)

    monkeypatch.setattr(folder, "headers", declines)
    assert inbox.take_all(folder).taken == 4
    assert list(folder.mails) == [3]


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = time.time()
        monkeypatch.setattr(time, "time", lambda: self.now)


def test_a_mail_that_zulip_can_never_take_is_tried_less_and_less_and_given_up(inbox, monkeypatch, capfd):
    clock = Clock(monkeypatch)
    inbox.service.answers = [LATER]
    folder = Folder(CHANNEL)
    began, tried = clock.now, 0
    while folder.mails:
        inbox.take_all(folder)
        if len(inbox.service.handed) > tried and clock.now - began < 3600:
            tried = len(inbox.service.handed)
        clock.now += 10
    assert 10 < tried < 25 and GIVEN_UP < clock.now - began < GIVEN_UP + 2000
    assert folder.failed == [1] and "not posted for 5.0 days: later" in capfd.readouterr().out


def test_that_it_is_tried_for_so_long_outlives_a_restart(inbox, monkeypatch, tmp_path):
    clock = Clock(monkeypatch)
    inbox.service.answers = [LATER]
    folder = Folder(CHANNEL)
    inbox.take_all(folder)
    clock.now += GIVEN_UP + 1
    another = remade(inbox, tmp_path)
    for _ in range(FEWEST_TRIES):  # the host may have been off for as long
        assert folder.failed == []
        another.take_all(folder)
        clock.now += 1000
    assert folder.failed == [1]


def test_once_zulip_is_up_again_all_is_tried_at_once(inbox, monkeypatch):
    """Not that which it never takes."""
    clock = Clock(monkeypatch)
    poison = {1}
    inbox.service.answers = [lambda uid: LATER if uid in poison else Delivered()]
    folder = Folder(CHANNEL, CHANNEL)
    inbox.take_all(folder)
    clock.now += 600
    inbox.take_all(folder)
    tries = len(inbox.service.handed)
    poison |= {3, 4, 5}
    folder.mails |= {3: CHANNEL, 4: CHANNEL, 5: CHANNEL}
    inbox.take_all(folder)
    clock.now += 100
    inbox.take_all(folder)
    poison -= {3, 4, 5}
    folder.mails[6] = CHANNEL
    inbox.take_all(folder)
    inbox.take_all(folder)
    assert list(folder.mails) == [1] and len(inbox.service.handed) == tries + 3 + 3 + 4


def test_our_own_bug_holds_up_one_mail_only(inbox):
    inbox.service.answers = [ZeroDivisionError("bug"), Delivered()]
    folder = Folder(CHANNEL, CHANNEL)
    assert inbox.take_all(folder) == (1, 1, False)
    assert list(folder.mails) == [1]


def test_what_cannot_be_set_aside_does_not_hold_up_the_rest(inbox):
    inbox.service.answers = [Refused("5.1.1", "unknown address", "no"), Delivered()]
    folder = Folder(CHANNEL, CHANNEL)
    folder.full = True
    assert inbox.take_all(folder) == (1, 1, False)
    assert list(folder.mails) == [1]


def test_a_zulip_that_is_down_is_not_asked_for_every_mail(inbox):
    inbox.service.answers = [LATER]
    folder = Folder(*[CHANNEL] * 50)
    assert inbox.take_all(folder) == (0, 50, False)
    assert len(inbox.service.handed) == 3


def test_mails_that_zulip_cannot_take_do_not_hold_up_those_behind(inbox):
    inbox.service.answers = [LATER, LATER, LATER, Delivered()]
    folder = Folder(*[CHANNEL] * 5)
    assert inbox.take_all(folder) == (0, 5, False)
    inbox.service.answers = [Delivered(), Delivered(), LATER]
    assert inbox.take_all(folder) == (2, 3, False)
    assert list(folder.mails) == [1, 2, 3]


def test_asked_to_stop_it_ends_between_two_mails(inbox, monkeypatch):
    folder = Folder(CHANNEL, CHANNEL)
    remove = folder.remove
    monkeypatch.setattr(folder, "remove", lambda uid: (inbox._on_sigterm(), remove(uid)))
    with pytest.raises(Stopped):
        inbox.take_all(folder)
    assert list(folder.mails) == [2]


def test_replies_pass_what_waits_for_room(inbox):
    inbox.service.answers = [Delivered(), LIMITED, Delivered()]
    folder = Folder(CHANNEL, CHANNEL, CHANNEL, REPLY, CHANNEL)
    assert inbox.take_all(folder) == (2, 3, True)
    assert inbox.service.handed == [CHANNEL, CHANNEL, REPLY]


def test_a_flooded_channel_does_not_hold_up_another(inbox):
    """Its own mail keeps its order."""
    inbox.service.answers = [lambda uid: LIMITED if uid < 4 else Delivered()]
    folder = Folder(CHANNEL, CHANNEL, CHANNEL, OTHER, CHANNEL, OTHER)
    assert inbox.take_all(folder) == (2, 4, True)
    assert inbox.service.handed == [CHANNEL, OTHER, OTHER]


def test_a_reply_that_comes_meanwhile_does_not_wait_for_the_rest(inbox, monkeypatch):
    folder = Folder(*[CHANNEL] * 5)
    remove = folder.remove
    monkeypatch.setattr(folder, "remove", lambda uid: (remove(uid), uid == 1 and folder.mails.update({6: REPLY})))
    assert inbox.take_all(folder) == (6, 0, False)
    assert inbox.service.handed == [CHANNEL, REPLY, *[CHANNEL] * 4]


def test_mails_that_always_fail_do_not_starve_others_that_wait(inbox, monkeypatch):
    """After an outage all wait; three of them are poison."""
    clock = Clock(monkeypatch)
    folder = Folder(*[CHANNEL] * 8)
    inbox.service.answers = [LATER]
    for _ in range(3):
        inbox.take_all(folder)
    poison = {1, 2, 3}
    inbox.service.answers = [lambda uid: LATER if uid in poison else Delivered()]
    clock.now += 10
    for _ in range(3):
        inbox.take_all(folder)
    assert set(folder.mails) == poison


def test_what_was_accepted_and_cannot_be_removed_does_not_hold_up_the_rest(inbox, monkeypatch):
    clock = Clock(monkeypatch)
    folder = Folder(CHANNEL, CHANNEL)
    remove = folder.remove

    def declines(uid):
        if uid == 1:
            raise Declined("4.4.2", "IMAP declined", "read only")
        remove(uid)

    monkeypatch.setattr(folder, "remove", declines)
    for _ in range(2):
        inbox.take_all(folder)
    clock.now += LEFT_ALONE
    inbox.take_all(folder)
    assert list(folder.mails) == [1] and len(inbox.service.handed) == 2


def breaks(folder: Folder, monkeypatch: pytest.MonkeyPatch, part: str, poison: int) -> None:
    """The session breaks whenever this mail is read."""
    read = getattr(folder, part)

    def hangs_up(uids, *more):
        if poison in (uids if isinstance(uids, list) else [uids]):
            raise Trouble("4.4.2", "IMAP session", "the session broke")
        return read(uids, *more)

    monkeypatch.setattr(folder, part, hangs_up)


@pytest.mark.parametrize("part", ["headers", "message"])
def test_a_mail_that_breaks_the_session_holds_up_no_other(inbox, monkeypatch, part):
    """It is read alone and last, and less and less; after five days it is set aside without being read."""
    clock = Clock(monkeypatch)
    folder = Folder(CHANNEL, CHANNEL, CHANNEL)
    breaks(folder, monkeypatch, part, 2)
    began, broken = clock.now, 0
    while 2 in folder.mails:
        try:
            inbox.take_all(folder)
        except Trouble:
            broken += 1
        clock.now += 10
        if clock.now - began == 100:
            assert list(folder.mails) == [2] and broken < 12
    assert folder.failed == [2] and GIVEN_UP < clock.now - began < GIVEN_UP + 2000


@pytest.mark.parametrize("part", ["headers", "message"])
def test_a_mail_that_the_server_does_not_show_is_not_forgotten(inbox, monkeypatch, part, capfd):
    clock = Clock(monkeypatch)
    folder = Folder(CHANNEL, CHANNEL, "nobody@example.org")
    show = getattr(folder, part)

    def shows_not_all(uids, *more):
        shown = show(uids, *more)
        return (
            {uid: seen for uid, seen in shown.items() if uid != 1}
            if part == "headers"
            else shown
            if uids != 1
            else None
        )

    monkeypatch.setattr(folder, part, shows_not_all)
    for _ in range(3):
        inbox.take_all(folder)
    assert (
        sorted(folder.mails) == [1, 3]
        and "UID 1 is left alone for 15 minutes: the server does" in capfd.readouterr().out
    )
    monkeypatch.setattr(folder, part, show)
    clock.now += LEFT_ALONE
    assert inbox.take_all(folder) == (1, 0, False)


def test_a_mail_that_cannot_be_set_aside_is_not_taken_for_one_that_is_not_for_zulip(inbox, monkeypatch):
    clock = Clock(monkeypatch)
    (inbox._config.state_dir / "inbox-reading.json").write_text(
        json.dumps({"inbox": f"{Folder.identity} zulip+%s@example.com", "ended": {"1": 2}})
    )
    folder = Folder(CHANNEL, "nobody@example.org")
    folder.full = True
    inbox.take_all(folder)
    inbox.take_all(folder)
    folder.full = False
    clock.now += LEFT_ALONE
    inbox.take_all(folder)
    assert folder.failed == [1]


def test_what_is_larger_than_the_server_says_is_set_aside(inbox, monkeypatch):
    folder = Folder(CHANNEL)
    monkeypatch.setattr(folder, "message", lambda *_: 10**6 + 1)
    inbox.take_all(folder)
    assert folder.failed == [1] and inbox.service.handed == []


def test_many_that_come_meanwhile_are_looked_at_in_batches(inbox, monkeypatch):
    folder = Folder(CHANNEL)
    remove = folder.remove
    monkeypatch.setattr(
        folder, "remove", lambda uid: (remove(uid), uid == 1 and folder.mails.update(dict.fromkeys(range(2, 302), "x")))
    )
    inbox.take_all(folder)
    assert len(folder.asked) == 1 + 300 / BATCH


class Enough(Exception):
    pass


@pytest.mark.parametrize(
    ("answer", "pauses"),
    [(LIMITED, (LIMIT_RETRY,) * 3), (LATER, RETRIES[:3]), (Delivered(), (WAITS[0], WAITS[1], WAITS[2]))],
)
def test_how_long_it_waits_for_what_comes(inbox, answer, pauses):
    """Room for channel mail is looked for steadily, Zulip less and less."""
    waited = []

    class Quiet(Folder):
        def half_removed(self) -> list[int]:
            return []

        def wait(self, seconds: float) -> None:
            waited.append(seconds)
            if len(waited) == 3:
                raise Enough

    inbox.service.answers = [answer]
    with pytest.raises(Enough):
        inbox._serve(Quiet(CHANNEL))
    assert tuple(waited) == pauses and inbox.service.asked == ["polled"]
