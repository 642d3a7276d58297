"""What smtpd is told before it accepts a mail."""

from __future__ import annotations

import re
import secrets
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from email_gateway import backlog, outcome, policy, questions
from email_gateway.address_book import Target
from email_gateway.gateway import Envelope
from email_gateway.journal import Journal, address_of
from email_gateway.outcome import IN_DOUBT
from email_gateway.policy import Coming, Policy
from email_gateway.verdict import NO_ANSWER, Deferred, Delivered, Refused, Trouble
from mails import POSTED, eventually, mail
from test_addresses import TOKEN

CHANNEL = f"general.{TOKEN}@mail.example.com"
REPLY = f"mm{TOKEN}@mail.example.com"
UNKNOWN = Refused("5.1.1", "unknown address", "Bad destination; please copy the address from Zulip again")
NO_TEXT = "Email has no nonempty body sections; ignoring."
TOO_MUCH = "450 4.7.28 2 mails wait for this channel already, and no more may; please try again later"


def someone() -> str:
    """An address of the right form that nobody has asked for."""
    return f"mm{secrets.token_hex(16)}@mail.example.com"


def begin(work: Callable[[], None]) -> bool:
    threading.Thread(target=work).start()
    return True


@pytest.fixture
def asked(gateway):
    """A policy whose Zulip knows all addresses, as long as .gateway.answers does not say otherwise."""
    gateway.tells = [NO_TEXT]
    said: list[str] = []
    made = Policy(lambda: gateway, begin, said.append)
    made.said, made.gateway = said, gateway
    return made


def rcpt(asked: Policy, recipient: str = CHANNEL, client: str = "192.0.2.1", coming: Coming | None = None) -> str:
    request = {"protocol_state": "RCPT", "recipient": recipient, "client_address": client, "instance": "1"}
    return asked._action(request, coming or Coming("1"))


def whole(asked: Policy, coming: Coming, queue_id: str = "", size: int = 100) -> str:
    queue_id = queue_id or secrets.token_hex(4)
    request = {"protocol_state": "END-OF-MESSAGE", "queue_id": queue_id, "size": str(size), "instance": "1"}
    return asked._action(request, coming)


def accept(asked: Policy, recipient: str = CHANNEL, queue_id: str = "", client: str = "192.0.2.1") -> str:
    """A whole mail; the first answer that does not let it through."""
    coming = Coming("1")
    answer = rcpt(asked, recipient, client, coming)
    return answer if answer != policy.DUNNO else whole(asked, coming, queue_id)


def test_an_unknown_address_is_rejected_and_asked_for_once(asked):
    asked.gateway.answers = [UNKNOWN]
    for _ in range(3):
        assert rcpt(asked) == f"550 5.1.1 {UNKNOWN.reason}"
    assert asked.gateway.handed == [(CHANNEL, b"")]
    asked.tidy(asked.gateway.journal)
    assert asked.gateway.journal.counts()["rejected"] == {"unknown address": 3}


def test_a_known_address_is_asked_for_once_and_what_it_costs_is_counted(asked):
    assert rcpt(asked) == rcpt(asked, CHANNEL.replace("general", "other")) == policy.DUNNO
    assert len(asked.gateway.handed) == 1
    asked.gateway.outcomes.read_log()
    (unit,) = asked.gateway.pace.units()
    assert unit.consumed is not None and unit.address == address_of(TOKEN)
    assert asked.gateway.journal.flights() == [] == asked.gateway.outcomes._flights


def test_a_reply_address_costs_nothing(asked):
    assert rcpt(asked, REPLY) == policy.DUNNO
    assert asked.gateway.pace.units() == []


def test_what_was_posted_is_known(asked):
    asked.gateway.tells = None
    assert asked.gateway.deliver(Envelope(CHANNEL), mail(b"m")) == POSTED
    assert rcpt(asked) == policy.DUNNO and len(asked.gateway.handed) == 1


def test_what_was_dropped_here_says_nothing_of_its_address(asked):
    """An automatic reply, which Zulip has not seen."""
    text = mail(b"Auto-Submitted: auto-replied\n\nm")
    assert asked.gateway.deliver(Envelope(REPLY), text).cause == "dropped"
    asked.gateway.answers = [UNKNOWN]
    assert rcpt(asked, REPLY).startswith("550 ")


def test_what_zulip_refuses_is_asked_for_again(asked):
    """The address was renewed since."""
    rcpt(asked)
    asked.gateway.answers = [UNKNOWN]
    asked.gateway.deliver(Envelope(CHANNEL), mail(b"m"))
    assert rcpt(asked).startswith("550 5.1.1 ")


def test_knowledge_ages(asked, monkeypatch):
    rcpt(asked)
    monkeypatch.setattr(questions, "GOOD", 0.0)
    asked.gateway.answers = [UNKNOWN]
    assert rcpt(asked).startswith("550 ")
    monkeypatch.setattr(asked._questions, "_clock", lambda: time.monotonic() + questions.BAD)
    asked.gateway.answers = [Delivered()]
    rcpt(asked)
    assert len(asked.gateway.handed) == 3


def test_what_may_not_be_posted_to_may_be_allowed_soon(asked, monkeypatch):
    asked.gateway.answers = [Refused("5.7.1", "unknown address", "Permission denied: archived")]
    assert rcpt(asked) == "550 5.7.1 Permission denied: archived"
    asked.gateway.answers = [Delivered()]
    assert rcpt(asked).startswith("550 ")
    monkeypatch.setattr(asked._questions, "_clock", lambda: time.monotonic() + questions.NOT_ALLOWED)
    assert rcpt(asked) == policy.DUNNO


def test_zulip_is_asked_five_times_a_second(asked, monkeypatch):
    """Whoever comes sixth comes back."""
    now = [1000.0]
    monkeypatch.setattr(asked._questions, "_clock", lambda: now[0])
    answers = [rcpt(asked, someone(), f"192.0.2.{number}") for number in range(8)]
    assert answers == [policy.DUNNO] * 5 + [answers[5]] * 3
    assert answers[5].startswith("450 4.7.1 too much mail for addresses that are not known yet; please try again")
    now[0] += 1.05
    assert rcpt(asked, someone()) == policy.DUNNO


def test_a_client_whose_questions_are_idle_asks_less_and_less(asked, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(asked._questions, "_clock", lambda: now[0])
    asked.gateway.answers = [UNKNOWN]
    for _ in range(600):
        rcpt(asked, someone(), "192.0.2.66")
        now[0] += 0.25
    assert len(asked.gateway.handed) <= 14
    assert rcpt(asked, someone(), "192.0.2.66").startswith("450 ")
    asked.gateway.answers = [Delivered()]
    assert rcpt(asked, someone(), "192.0.2.1") == policy.DUNNO


def test_a_client_is_forgiven(asked, monkeypatch):
    """Some time after the last idle question it begins anew; and of IPv6 a host has a whole network."""
    now = [1000.0]
    monkeypatch.setattr(asked._questions, "_clock", lambda: now[0])
    asked.gateway.answers = [UNKNOWN]
    for number in range(10):
        rcpt(asked, someone(), f"2001:db8::{number}")
        now[0] += 30
    assert rcpt(asked, someone(), "2001:db8::77")[:3] == "550"
    assert rcpt(asked, someone(), "2001:db8::88")[:3] == "450" and rcpt(asked, someone(), "2001:db8:1::1")[:3] == "550"
    now[0] += 400
    assert rcpt(asked, someone(), "2001:db8::99")[:3] == "550"
    now[0] += 0.6
    assert rcpt(asked, someone(), "2001:db8::aa")[:3] == "550"


def test_a_thread_that_does_not_start_holds_up_nothing(asked):
    asked._questions._begin = lambda work: False
    assert rcpt(asked) == policy.DUNNO and asked._questions._asking == set()


def test_what_the_journal_could_not_be_told_of_a_question_it_is_told_later(asked, monkeypatch):
    change, fails = asked.gateway.journal.change, [True]

    def failing(sync=False):
        if asked.gateway.handed and fails:
            raise Trouble("4.3.0", "journal", "the disk is full")
        return change(sync)

    monkeypatch.setattr(asked.gateway.journal, "change", failing)
    asked.gateway.answers = [UNKNOWN]
    rcpt(asked)
    fails.clear()
    assert len(asked.gateway.pace.units()) == 1
    asked.gateway.tidy()
    assert asked.gateway.pace.units() == []


def test_a_question_in_doubt_keeps_its_line(asked):
    """Zulip hung when it was asked, and goes on later: what is said of it is not said of a reply."""
    asked.gateway.answers = [Deferred("4.4.2", NO_ANSWER, "silent", in_doubt=True)]
    assert rcpt(asked, REPLY) == policy.DUNNO
    assert eventually(lambda: not asked._questions._asking)
    asked.gateway.answers = [Delivered()]
    asked.gateway.tells = [NO_TEXT, "Successfully processed email from user 9 to general"]
    other = REPLY.replace(TOKEN, TOKEN[::-1])
    assert asked.gateway.deliver(Envelope(other), mail(b"m")) == POSTED
    assert asked.gateway.journal.flights() == []


def test_a_question_in_doubt_does_not_keep_its_place_for_ever(asked, monkeypatch):
    """Nothing is ever said of it: Zulip may have counted it when it was asked."""
    asked.gateway.answers = [Deferred("4.4.2", NO_ANSWER, "silent", in_doubt=True)]
    assert rcpt(asked) == policy.DUNNO
    assert eventually(lambda: not asked._questions._asking)
    assert [one.consumed for one in asked.gateway.pace.units()] == [None]
    monkeypatch.setattr(outcome, "_DOUBTED", 0.0)
    asked.gateway.tidy()
    assert [one.consumed is None for one in asked.gateway.pace.units()] == [False]
    assert asked.gateway.journal.flights() == []


def test_the_same_address_is_asked_for_once_at_a_time(asked):
    answers: list[str] = []
    threads = [threading.Thread(target=lambda: answers.append(rcpt(asked))) for _ in range(20)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert answers == [policy.DUNNO] * 20 and len(asked.gateway.handed) == 1


def test_a_slow_zulip_holds_up_no_mail(asked, monkeypatch):
    """What it says later is good for the next."""
    monkeypatch.setattr(questions, "PATIENCE", 0.1)
    hand_over, answers, answered = asked.gateway.backend().hand_over, threading.Event(), []

    def slowly(*arguments):
        answered.append(answers.wait(20))
        return hand_over(*arguments)

    monkeypatch.setattr(asked.gateway.backend(), "hand_over", slowly)
    asked.gateway.answers = [UNKNOWN]
    assert rcpt(asked) == policy.DUNNO and not answered
    answers.set()
    assert eventually(lambda: rcpt(asked).startswith("550 ")) and len(asked.gateway.handed) == 1


@pytest.mark.parametrize(
    "verdict",
    [
        Deferred("4.4.2", NO_ANSWER, "silent", in_doubt=True),
        Deferred("4.3.2", "HTTP 502", "down"),
        Refused("5.3.4", "x", "y"),
        ZeroDivisionError(),
    ],
)
def test_a_zulip_in_trouble_holds_up_no_mail(asked, verdict):
    asked.gateway.answers = [verdict]
    assert rcpt(asked, REPLY) == policy.DUNNO
    assert eventually(lambda: not [one for one in asked.gateway.journal.flights() if one.handed != IN_DOUBT])


def test_a_zulip_that_is_down_holds_up_no_flood_either(asked, monkeypatch):
    """It is asked once in a while, and who writes to the same channel meanwhile is not sent away."""
    asked.gateway.answers = [Deferred("4.4.1", "connection refused", "down")]
    assert [rcpt(asked) for _ in range(50)] == [policy.DUNNO] * 50
    assert len(asked.gateway.handed) == 1
    # Nor is the door wide open for junk.
    assert [rcpt(asked, someone())[:4] for _ in range(8)] == [policy.DUNNO[:4]] * 4 + ["450 "] * 4
    assert len(asked.gateway.handed) == 1
    asked.gateway.answers = [UNKNOWN]
    monkeypatch.setattr(asked._questions, "_clock", lambda: time.monotonic() + questions._SILENCE)
    assert rcpt(asked, someone()).startswith("550 ")


def test_want_of_room_of_one_channel_keeps_nothing_from_being_asked(asked):
    with asked.gateway.journal.change() as database:
        asked.gateway.journal.add_consumed(database, [time.time()] * 50)
    assert [rcpt(asked) for _ in range(10)] == [policy.DUNNO] * 10
    asked.gateway.answers = [UNKNOWN]
    assert rcpt(asked, REPLY).startswith("550 ")


def test_without_room_nothing_is_asked(asked):
    with asked.gateway.journal.change() as database:
        asked.gateway.journal.add_consumed(database, [time.time()] * 50)
    assert rcpt(asked) == policy.DUNNO and asked.gateway.handed == []
    assert rcpt(asked, REPLY) == policy.DUNNO and len(asked.gateway.handed) == 1


def test_nothing_is_asked_where_that_is_not_wanted(asked):
    asked.gateway.config = asked.gateway.config._replace(asks=False)
    asked.gateway.answers = [UNKNOWN]
    assert rcpt(asked) == policy.DUNNO and asked.gateway.handed == []


def test_the_line_about_a_question_is_nobody_elses(asked):
    """A question that is with Zulip when a mail follows: each gets its own line."""
    asked.gateway.tells = []
    assert rcpt(asked, REPLY) == policy.DUNNO
    asked.gateway.tells = [NO_TEXT, "Successfully processed email from user 9 to general"]
    other = REPLY.replace(TOKEN, TOKEN[::-1])
    assert asked.gateway.deliver(Envelope(other), mail(b"m")) == POSTED
    assert asked.gateway.journal.flights() == []


def test_a_question_has_nothing_that_could_be_posted(asked):
    """Another producer's line, then: the one about the question comes behind it."""
    posted = "Successfully processed email from user 8 to other"
    asked.gateway.tells = [posted]
    assert rcpt(asked, REPLY) == policy.DUNNO
    asked.gateway.outcomes.read_log()
    assert len(asked.gateway.journal.flights()) == 1


def test_too_much_waits_until_some_of_it_is_gone(asked):
    asked.gateway.config = asked.gateway.config._replace(most_queued=2)
    assert accept(asked, queue_id="A") == accept(asked, queue_id="B") == policy.DUNNO
    assert accept(asked) == TOO_MUCH
    assert accept(asked, REPLY) == accept(asked, CHANNEL.replace(TOKEN, TOKEN[::-1])) == policy.DUNNO
    asked.gateway.tells = None
    asked.gateway.deliver(Envelope(CHANNEL, queue_id="A", source="postfix", known_by=("A",)), mail(b"m"))
    assert accept(asked) == policy.DUNNO
    assert accept(asked) == TOO_MUCH


def test_what_is_deferred_waits_on(asked):
    asked.gateway.config = asked.gateway.config._replace(most_queued=1)
    accept(asked, queue_id="A")
    asked.gateway.answers = [Deferred("4.3.2", "HTTP 502", "down")]
    asked.gateway.deliver(Envelope(CHANNEL, queue_id="A", source="postfix", known_by=("A",)), mail(b"m"))
    assert accept(asked).startswith("450 4.7.28 1 mails wait")


def test_several_at_once_are_not_too_many(asked):
    """They were let through while there was room for one; only one of them is taken in."""
    asked.gateway.config = asked.gateway.config._replace(most_queued=1)
    coming = [Coming("1") for _ in range(3)]
    assert [rcpt(asked, coming=one) for one in coming] == [policy.DUNNO] * 3
    assert sorted(whole(asked, one)[:3] for one in coming) == ["450", "450", "DUN"]


def test_what_an_operator_has_deleted_does_not_wait_for_ever(asked, monkeypatch):
    """Nothing of it is brought any more, for longer than Postfix lets a mail wait."""
    asked.gateway.config = asked.gateway.config._replace(most_queued=1)
    accept(asked)
    later = backlog.STALE + 1
    monkeypatch.setattr(asked.gateway.backlog, "_clock", lambda: time.monotonic() + later)
    assert accept(asked).startswith("450 ")  # it may have come just now
    with asked.gateway.journal.change() as database:
        database.execute("UPDATE queued SET at = at - ?", (later,))
    with asked.gateway.backlog.brought(address_of(TOKEN)):
        assert accept(asked).startswith("450 ")  # one is waiting for room right now
    monkeypatch.setattr(asked.gateway.backlog, "_clock", lambda: time.monotonic() + 3 * later)
    assert accept(asked) == policy.DUNNO


def test_what_is_not_from_postfix_says_nothing_of_its_queue(asked):
    asked.gateway.deliver(Envelope(CHANNEL), mail(b"m"))
    assert asked.gateway.backlog._brought == {}
    asked.gateway.deliver(Envelope(CHANNEL, queue_id="A", source="postfix", known_by=("A",)), mail(b"m"))
    assert len(asked.gateway.backlog._brought) == 1


@pytest.mark.parametrize("brings_others", [True, False])
def test_what_is_gone_is_not_said_to_wait(asked, monkeypatch, brings_others):
    """Unless Postfix brings nothing at all: then it is stopped, or cannot."""
    accept(asked)
    for seconds, waits in ((backlog.STALE / 2, True), (backlog.STALE + 1, not brings_others)):
        with asked.gateway.journal.change() as database:
            database.execute("UPDATE queued SET at = accepted - ?", (seconds,))
        monkeypatch.setattr(asked.gateway.backlog, "_clock", lambda seconds=seconds: time.monotonic() + seconds)
        if brings_others:
            with asked.gateway.backlog.brought(b"another"):
                pass
        asked.gateway.backlog.tidy()
        assert (asked.gateway.journal.waits_since() is not None) == waits


def test_what_should_have_been_brought_before_is_gone(asked):
    """Also where others are brought all the time."""
    asked.gateway.config = asked.gateway.config._replace(most_queued=2)
    accept(asked, queue_id="GONE")
    with asked.gateway.journal.change() as database:
        database.execute("UPDATE queued SET at = at - ?", (backlog.STALE + 1,))
    accept(asked, queue_id="B")
    asked.gateway.tells = None
    envelope = Envelope(CHANNEL, queue_id="B", source="postfix", known_by=("B",))
    asked.gateway.answers = [Deferred("4.3.2", "HTTP 502", "down")]
    asked.gateway.deliver(envelope, mail(b"m"))
    assert asked.gateway.journal.number_queued(address_of(TOKEN)) == 2
    asked.gateway.answers = [Delivered()]
    asked.gateway.deliver(envelope, mail(b"m"))
    assert asked.gateway.journal.number_queued(address_of(TOKEN)) == 0


def test_that_is_longer_than_postfix_lets_any_mail_wait():
    text = (Path(__file__).parents[1] / "roles/postfix_localmail/templates/etc/postfix/main.cf.j2").read_text()
    found = re.search(r"^maximal_backoff_time = (\d+)s$", text, re.MULTILINE)
    assert found and int(found[1]) < backlog.STALE


def test_roots_mailbox_is_not_filled_from_outside(asked):
    postmaster = "Postmaster@mail.example.com"
    coming = Coming("1")
    assert rcpt(asked, postmaster, coming=coming) == policy.DUNNO
    assert whole(asked, coming, size=200_000) == "552 5.3.4 postmaster takes at most 102400 bytes"
    at_once = [Coming("1") for _ in range(12)]
    assert [rcpt(asked, postmaster, coming=one) for one in at_once] == [policy.DUNNO] * 12
    assert [whole(asked, one)[:3] for one in at_once] == ["DUN"] * 5 + ["450"] * 7
    assert accept(asked, postmaster) == "450 4.7.28 postmaster has got much mail lately; please try again later"


def test_nobody_alone_keeps_others_from_postmaster(asked):
    postmaster = "postmaster@mail.example.com"
    for number in range(199):
        accept(asked, postmaster, client=f"2001:db8:0:{number // 5:x}::{number}")
    assert accept(asked, postmaster, client="2001:db8::ffff").startswith("450 ")
    assert accept(asked, postmaster, client="192.0.2.9") == policy.DUNNO
    assert accept(asked, postmaster, client="192.0.2.10").startswith("450 ")


def test_what_is_no_address_of_zulips_is_postfixs_business(asked):
    for recipient in (f"{TOKEN}@other.example.com", "", "\udcff@x"):
        assert rcpt(asked, recipient) == policy.DUNNO
    assert rcpt(asked, f"{TOKEN}.word@mail.example.com").startswith("550 5.1.1 the address is neither")
    assert asked.gateway.handed == []


def test_what_stands_with_a_token_makes_no_other_channel_of_it(asked):
    """Neither for what may wait, nor for what is known; and one that Zulip takes for another is another."""
    assert rcpt(asked) == rcpt(asked, f"x.{TOKEN}.{'a' * 32}@mail.example.com") == policy.DUNNO
    assert len(asked.gateway.handed) == 1
    asked.gateway.answers = [UNKNOWN]
    assert rcpt(asked, f"general.{'b' * 32}.{TOKEN}@mail.example.com").startswith("550 ")
    assert rcpt(asked) == policy.DUNNO


def test_trouble_of_our_own_holds_up_no_mail(asked):
    def trouble():
        raise Trouble("4.3.0", "journal", "the disk is full")

    asked._gateway = trouble
    assert accept(asked) == accept(asked) == policy.DUNNO
    assert asked.said == ["mail is accepted without looking: the disk is full"]


def test_smtpd_asks_as_often_as_it_likes(asked):
    """In one connection, in pieces, with attributes of its own; garbage ends it."""
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=lambda: (asked.converse(ours), ours.close()))
    thread.start()
    asked.gateway.answers = [UNKNOWN]
    for _ in range(3):
        theirs.sendall(b"request=smtpd_access_policy\nprotocol_state=RCPT\nsender=\xff=\n")
        theirs.sendall(f"recipient={CHANNEL}\nclient_address=192.0.2.1\n\n".encode())
        assert re.fullmatch(rb"action=550 5\.1\.1 [^\n]*\n\n", theirs.recv(1000))
    theirs.sendall(b"no=request\n\n")
    assert theirs.recv(1000) == b"action=DUNNO\n\n"
    theirs.sendall(b"x" * 200_000)
    thread.join(5)
    assert not thread.is_alive()


def test_an_answer_that_needs_no_zulip_takes_no_time(asked):
    """5 ms; measured with a full channel, a bad and a good address."""
    asked.gateway.config = asked.gateway.config._replace(most_queued=1)
    accept(asked)
    began = time.perf_counter()
    for _ in range(200):
        rcpt(asked)
    assert (time.perf_counter() - began) / 200 < 0.005


def test_a_hundred_smtpds_ask_at_once(asked):
    """Each of them again and again; none waits for another."""
    rcpt(asked)
    pairs = [socket.socketpair() for _ in range(100)]
    threads = [threading.Thread(target=lambda end=ours: (asked.converse(end), end.close())) for ours, _ in pairs]
    for thread in threads:
        thread.start()
    request = f"protocol_state=RCPT\nrecipient={CHANNEL}\nclient_address=192.0.2.1\n\n".encode()
    began = time.perf_counter()
    for _ in range(5):
        for _, theirs in pairs:
            theirs.sendall(request)
        assert all(theirs.recv(1000) == b"action=DUNNO\n\n" for _, theirs in pairs)
    assert (time.perf_counter() - began) / 500 < 0.005
    for _, theirs in pairs:
        theirs.close()
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()


def test_what_is_known_outlives_a_restart(asked):
    rcpt(asked)
    assert Journal(asked.gateway.config.state_dir).known_since(address_of(TOKEN)) > time.time() - 60
    assert asked.gateway.config.addresses.parse(CHANNEL).is_reply is False


@pytest.fixture
def book(asked):
    """The address book may be changed."""

    def change(**changes):
        config = asked.gateway.config
        asked.gateway.config = config._replace(addresses=config.addresses._replace(**changes))

    return change


def from_(asked, sender, recipient=CHANNEL):
    request = {"protocol_state": "RCPT", "recipient": recipient, "client_address": "192.0.2.1", "sender": sender}
    return asked._action(request, Coming())


def test_who_may_not_write_is_rejected_and_zulip_not_asked(asked, book):
    book(senders={TOKEN: ("@example.net",)}, blocked=("spam@example.net",))
    assert from_(asked, "a@example.org") == "550 5.7.1 only certain senders may write to this address"
    assert from_(asked, "") == "550 5.7.1 only certain senders may write to this address"
    assert from_(asked, "spam@example.net") == "550 5.7.1 this sender is blocked here"
    assert from_(asked, "spam@example.net", REPLY) == "550 5.7.1 this sender is blocked here"
    assert asked.gateway.handed == []
    assert from_(asked, "spam@example.net", "postmaster@mail.example.com") == policy.DUNNO
    assert from_(asked, "a@example.net") == policy.DUNNO


def test_an_alias_whose_channel_is_gone_is_no_reason_to_reject_for_good(asked, book):
    book(aliases={"ops": Target(TOKEN, "#ops")})
    asked.gateway.answers = [UNKNOWN]
    answer = from_(asked, "a@example.net", "ops@mail.example.com")
    assert answer.startswith("450 4.3.5 the alias ops leads to an address that Zulip does not know any more")
    assert TOKEN not in answer


NOREPLY = "noreply-ab12@mail.example.com"


@pytest.mark.parametrize(
    ("sender", "header", "is_rejected"),
    [("", b"", False), ("a@example.net", b"", True), ("a@example.net", b"Auto-Submitted: auto-replied\n", False)],
)
def test_zulips_own_sender(asked, book, sender, header, is_rejected):
    """Who asks whether it is there is told so, and a bounce and a machine's answer are taken."""
    book(sends_from=("noreply-{token}@mail.example.com",))
    assert rcpt(asked, NOREPLY) == policy.DUNNO
    for recipients in ([NOREPLY], [CHANNEL, NOREPLY]):
        reply = asked.reply_to_header(sender, recipients, mail(header + b"From: a@example.net\n\n"))
        assert reply.startswith("550 5.7.1 Zulip only sends from this address") == is_rejected
        assert (reply == "") != is_rejected
    assert asked.gateway.handed == []


@pytest.mark.parametrize("recipient", ["postmaster@mail.example.com", "nobody@mail.example.com", "a@example.org"])
def test_what_is_no_address_is_not_told_of_by_its_header(asked, recipient):
    assert asked.reply_to_header("a@example.net", [recipient], mail(b"From: a@example.net\n\n")) == ""


def test_by_its_header_an_author_is_rejected_and_counted(asked, book):
    book(blocked=("@example.net",))
    header = mail(b"From: a@example.net\n\n")
    assert asked.reply_to_header("b@example.org", [CHANNEL], header) == "550 5.7.1 this sender is blocked here"
    asked.tidy(asked.gateway.journal)
    assert asked.gateway.journal.counts() == {"rejected": {"blocked sender": 1}}


@pytest.mark.parametrize(
    ("mode", "header", "dashes", "is_rejected"),
    [
        ("mark", b"Content-Type: multipart/mixed; boundary=x\n", 20_001, True),
        ("mark", b"Content-Type:\n MESSAGE/rfc822\n", 20_001, True),
        ("mark", b"Content-Type: multipart/mixed; boundary=x\n", 20_000, False),
        ("mark", b"Content-Type: text/plain\n", 10**6, False),
        ("off", b"Content-Type: multipart/mixed; boundary=x\n", 10**6, False),
    ],
)
def test_more_parts_than_can_be_checked(asked, mode, header, dashes, is_rejected):
    asked.gateway.config = asked.gateway.config._replace(sender_checks=mode)
    assert asked.wants_body == (mode != "off")
    reply = asked.reply_to_header("a@example.net", [CHANNEL], mail(header + b"From: a@example.net\n\n"), dashes)
    assert reply.startswith("550 5.6.0 this mail has more than 20000 lines") == is_rejected
    assert (reply == "") != is_rejected


def test_trouble_with_a_header_stops_no_mail(asked, monkeypatch):
    monkeypatch.setattr(policy.admission, "verdict", lambda *_: 1 / 0)
    assert asked.reply_to_header("a@example.net", [CHANNEL], mail(b"\n")) == ""
    assert "ZeroDivisionError" in asked.said[0] or "division" in asked.said[0]
