"""One mail's way through the gateway, and what is left behind."""

from __future__ import annotations

import base64
import mmap
import os
import threading
import time

import pytest
from email_gateway import gateway as gateway_module
from email_gateway.address_book import Target
from email_gateway.backend_http import HttpBackend
from email_gateway.failures import Failed, Failures
from email_gateway.gateway import Envelope
from email_gateway.journal import Journal, Mail, disk_space
from email_gateway.message import Message, stored
from email_gateway.quarantine import Quarantine
from email_gateway.verdict import Deferred, Delivered, Refused, Trouble, answer, bug, understood
from mails import BEFORE, POSTED, mail, tell
from test_addresses import TOKEN

CHANNEL = f"general.{TOKEN}@mail.example.com"
REPLY = f"mm{TOKEN}@mail.example.com"
FROM_POSTFIX = Envelope(CHANNEL, "user@example.org", "QID", "postfix", ("postfix", "QID", CHANNEL))


def units(gateway):
    return gateway.journal.units(0)


@pytest.mark.parametrize(
    ("verdict", "kept"),
    [
        (Delivered(), 1),
        (Refused("5.1.1", "unknown address", "no"), 0),
        (Deferred("4.3.2", "HTTP 502", "later"), 0),
        (Deferred("4.4.2", "no answer", "later", in_doubt=True), 1),
        (Deferred("4.3.2", "SMTP 500", "later", counted=True), 1),
    ],
)
def test_only_what_zulip_may_have_holds_a_unit(gateway, verdict, kept):
    gateway.answers = [verdict]
    expected = POSTED if verdict == Delivered() else verdict
    assert gateway.deliver(Envelope(CHANNEL), mail(b"m")) == expected
    assert len(units(gateway)) == kept


def test_zulips_own_rate_limit_holds_mail_back_longer_each_time(gateway):
    gateway.answers = [Deferred("4.7.28", "rate limit", "later")]
    assert gateway.deliver(Envelope(CHANNEL), mail(b"m"), max_wait=1).cause == "rate limit"
    assert units(gateway) == [] and len(gateway.handed) == 1
    held = gateway.deliver(Envelope(CHANNEL), mail(b"m"), max_wait=1)
    assert held.cause == "rate limit" and len(gateway.handed) == 1  # Zulip was not asked again
    gateway.answers = [Delivered()]
    gateway.deliver(Envelope(REPLY), mail(b"m"))
    assert len(gateway.handed) == 2  # a reply does not wait, and does not end the waiting
    backoff = gateway.journal.note("backoff")
    assert backoff["seconds"] == 5
    set_backoff(gateway, {**backoff, "until": 0})
    gateway.answers = [Deferred("4.7.28", "rate limit", "later")]
    gateway.deliver(Envelope(CHANNEL), mail(b"m"), max_wait=1)
    assert gateway.journal.note("backoff")["seconds"] == 10
    set_backoff(gateway, {**backoff, "until": 0})
    gateway.answers = [Delivered()]
    assert gateway.deliver(Envelope(CHANNEL), mail(b"m")) == POSTED
    assert gateway.journal.note("backoff") is None


def set_backoff(gateway, backoff):
    with gateway.journal.change() as database:
        gateway.journal.write_note(database, "backoff", backoff)


def test_an_answer_to_a_reply_ends_the_waiting_for_a_silent_zulip(gateway):
    gateway.answers = [Deferred("4.4.2", "no answer", "silent", in_doubt=True)]
    gateway.deliver(Envelope(CHANNEL), mail(b"m"))
    assert gateway.journal.note("backoff")["cause"] == "no answer"
    gateway.answers = [Delivered()]
    gateway.deliver(Envelope(REPLY), mail(b"m"))
    assert gateway.journal.note("backoff") is None


def test_a_mail_that_zulip_chokes_on_holds_up_no_other(gateway):
    """Zulip answers, so it is there: 500 after DATA."""
    gateway.answers = [Deferred("4.3.2", "SMTP 500", "later", counted=True), Delivered()]
    gateway.deliver(Envelope(CHANNEL), mail(b"poison"))
    assert gateway.deliver(Envelope(CHANNEL), mail(b"m"), max_wait=0.1) == POSTED


def test_replies_take_no_unit(gateway):
    gateway.deliver(Envelope(REPLY), mail(b"m"))
    assert units(gateway) == [] and len(gateway.handed) == 1


def test_refused_is_kept_and_counted(gateway):
    gateway.answers = [Refused("5.1.1", "unknown address", "no such")]
    gateway.deliver(FROM_POSTFIX, mail(b"the mail"))
    [copy] = gateway.journal.copies()
    assert b"".join(gateway.quarantine.pieces(copy.id)) == b"the mail"
    assert copy[1:5] == (CHANNEL, "user@example.org", "QID", "no such")
    assert gateway.journal.counts() == {"refused": {"unknown address": 1}}
    assert {path.stat().st_mode & 0o777 for path in gateway.quarantine.folder.iterdir()} == {0o600}


def test_no_gateway_address_is_refused_without_asking_zulip(gateway):
    assert isinstance(gateway.deliver(Envelope("info@mail.example.com"), mail(b"m")), Refused)
    assert gateway.handed == []


@pytest.mark.parametrize("recipient", [CHANNEL, REPLY])
def test_the_same_mail_again_is_answered_from_the_journal(gateway, recipient):
    """As after Postfix was stopped between the hand-over and its answer."""
    envelope = FROM_POSTFIX._replace(recipient=recipient, known_by=("postfix", "QID", recipient))
    assert gateway.deliver(envelope, mail(b"m")) == POSTED
    assert gateway.deliver(envelope, mail(b"m")) == BEFORE
    assert len(gateway.handed) == 1 and gateway.journal.counts() == {"delivered": {"posted": 1}}
    # A queue ID comes again, with another mail.
    assert gateway.deliver(envelope, mail(b"other")) == POSTED


def test_the_same_refused_mail_again_is_kept_once(gateway):
    gateway.answers = [Refused("5.1.1", "unknown address", "no")]
    assert gateway.deliver(FROM_POSTFIX, mail(b"m")) == gateway.deliver(FROM_POSTFIX, mail(b"m"))
    assert len(gateway.journal.copies()) == len(gateway.handed) == 1


def test_by_hand_the_same_mail_goes_as_often_as_it_is_given(gateway):
    for _ in range(2):
        assert gateway.deliver(Envelope(CHANNEL), mail(b"m")) == POSTED
    assert len(gateway.handed) == 2


def test_the_same_mail_twice_at_a_time_is_handed_over_once(gateway, monkeypatch):
    """Postfix was restarted while the first delivery still ran."""
    original = HttpBackend.hand_over
    monkeypatch.setattr(HttpBackend, "hand_over", lambda *mail: (time.sleep(0.2), original(*mail))[1])
    verdicts: list[object] = []
    threads = [
        threading.Thread(target=lambda: verdicts.append(gateway.deliver(FROM_POSTFIX, mail(b"m")))) for _ in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(gateway.handed) == 1 and {type(verdict) for verdict in verdicts} == {Delivered} and len(verdicts) == 5


def test_one_after_the_other_also_where_the_first_is_deferred(gateway, monkeypatch):
    """Three at the same time, two of them deferred: never two hand-overs at once."""
    at_once: list[int] = []
    running = [0]

    def hand_over(*_: object) -> object:
        running[0] += 1
        at_once.append(running[0])
        time.sleep(0.1)
        running[0] -= 1
        return Delivered() if len(at_once) == 3 else Deferred("4.3.2", "HTTP 502", "later")

    monkeypatch.setattr(HttpBackend, "hand_over", hand_over)
    envelope = FROM_POSTFIX._replace(recipient=REPLY)
    threads = []
    for _ in range(3):
        threads.append(threading.Thread(target=lambda: gateway.deliver(envelope, mail(b"m"))))
        threads[-1].start()
        time.sleep(0.06)
    for thread in threads:
        thread.join()
    assert at_once == [1, 1, 1] and gateway._busy == {}


def fail_on(monkeypatch, gateway, when):
    """The journal cannot be written when it is called for the n-th time."""
    change, calls = gateway.journal.change, [0]

    def failing(sync=False):
        calls[0] += 1
        if when(calls[0]):
            raise Trouble("4.3.0", "journal", "cannot use the journal in /x: database or disk is full")
        return change(sync)

    monkeypatch.setattr(gateway.journal, "change", failing)


def test_an_unwritable_journal_defers_and_delivers_nothing(gateway, monkeypatch):
    for recipient in (CHANNEL, REPLY):
        fail_on(monkeypatch, gateway, lambda _: True)
        verdict = gateway.deliver(Envelope(recipient), mail(b"m"))
        assert isinstance(verdict, Deferred) and "disk is full" in verdict.reason and gateway.handed == []
        monkeypatch.undo()


def test_what_zulip_accepted_stays_delivered(gateway, monkeypatch):
    """The journal cannot be written between the hand-over and the note of it."""
    fail_on(monkeypatch, gateway, lambda call: call == 5)  # unit, begin, handed, outcome, finish
    verdict = gateway.deliver(FROM_POSTFIX, mail(b"m"))
    assert isinstance(verdict, Delivered) and "disk is full" in verdict.note
    again = gateway.deliver(FROM_POSTFIX, mail(b"m"))
    assert isinstance(again, Delivered) and len(gateway.handed) == 1
    gateway.tidy()  # written as soon as that is possible
    assert isinstance(Journal(gateway.config.state_dir).verdict(mail_key(gateway)), Delivered)


def mail_key(gateway):
    with gateway.journal.change() as database:
        return database.execute("SELECT key FROM mail").fetchone()[0]


def test_refused_without_room_for_its_copy_is_deferred(gateway, monkeypatch):
    gateway.answers = [Refused("5.1.1", "unknown address", "no")]
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    verdict = gateway.deliver(FROM_POSTFIX, mail(b"m"))
    assert isinstance(verdict, Deferred) and "cannot keep a copy" in verdict.reason
    assert list(gateway.quarantine.folder.iterdir()) == []  # or each new try would fill the disk further


def test_a_bug_gives_the_mail_back_and_does_not_stand_in_the_way(gateway):
    gateway.answers = [ZeroDivisionError("bug"), Delivered()]
    verdict = gateway.deliver(FROM_POSTFIX, mail(b"m"))
    assert isinstance(verdict, Deferred) and "ZeroDivisionError" in verdict.reason and units(gateway) == []
    assert gateway.deliver(FROM_POSTFIX, mail(b"m")) == POSTED


def test_a_unit_that_could_not_be_given_back_is_later(gateway, monkeypatch):
    gateway.answers = [Deferred("4.3.2", "HTTP 502", "later")]
    fail_on(monkeypatch, gateway, lambda call: call == 3)
    gateway.deliver(FROM_POSTFIX, mail(b"m"))
    assert len(units(gateway)) == 1
    gateway.tidy()
    assert units(gateway) == []


@pytest.mark.parametrize(("verdict", "counted"), [(Delivered(), 1), (Deferred("4.3.2", "HTTP 502", "later"), 0)])
def test_a_journal_lost_in_the_middle_keeps_the_units_of_others(gateway, monkeypatch, verdict, counted):
    def lost(*_: object) -> object:
        for path in gateway.config.state_dir.glob("journal*"):
            path.unlink()
        with gateway.journal.change() as database:
            gateway.journal.add_consumed(database, [1e10])
        tell(gateway.config.logs, *(["Successfully processed email to general (zulip)"] * counted))
        return verdict

    monkeypatch.setattr(HttpBackend, "hand_over", lost)
    gateway.deliver(FROM_POSTFIX, mail(b"m"))
    assert [unit.consumed == 1e10 for unit in units(gateway)] == [True] + [False] * counted


def test_what_waits_when_the_service_ends_is_given_back(gateway):
    gateway.answers = [Deferred("4.7.28", "rate limit", "later")]
    gateway.deliver(Envelope(CHANNEL), mail(b"m"))
    gateway.stopping.set()
    verdict = gateway.deliver(Envelope(CHANNEL), mail(b"m"), max_wait=60)
    assert isinstance(verdict, Deferred) and verdict.cause == "stopping"


def keep(gateway, content, lost=False):
    one = Envelope(CHANNEL, "", "")
    gateway.answers = [Refused("5.1.1", "unknown address", "no")]
    gateway.deliver(one, mail(content))
    return gateway.journal.copies()[-1]


def test_the_quarantine_is_bounded_by_size_and_age(gateway):
    store = Quarantine(gateway.config.state_dir, gateway.journal, max_bytes=2 * disk_space(10), max_days=1)
    gateway.quarantine = store
    copies = [keep(gateway, b"x" * 10) for _ in range(4)]
    assert gateway.journal.copies() == copies[2:]
    with gateway.journal.change() as database:
        database.execute("UPDATE mail SET changed = changed - 90000 WHERE copy = ?", (copies[2].id,))
    store.tidy()
    assert gateway.journal.copies() == copies[3:]
    big = keep(gateway, b"x" * 20_000)
    assert gateway.journal.copies() == [big]  # the newest goes by age only
    Quarantine(gateway.config.state_dir, gateway.journal, max_bytes=disk_space(10), max_days=1e-9).tidy()
    assert gateway.journal.copies() == [] == list(gateway.quarantine.folder.iterdir())


def lose(gateway, content):
    with stored(gateway.spool) as file:
        file.write(base64.b64encode(content))
        file.flush()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            failed = Failed(0.0, CHANNEL, 0, len(text), torn=True)
            return Failures(gateway)._again(text, failed, ("1", str(time.time_ns()), "0"))


def test_what_zulip_lost_goes_only_when_that_is_said(gateway):
    """There is no other copy."""
    lose(gateway, b"lost")
    keep(gateway, b"refused")
    assert gateway.quarantine.purge(0) == 1
    Quarantine(gateway.config.state_dir, gateway.journal, max_bytes=1, max_days=1e-9).tidy()
    [copy] = gateway.journal.copies()
    assert copy.lost and b"".join(gateway.quarantine.pieces(copy.id)) == b"lost"
    assert gateway.quarantine.purge(0, lost_too=True) == 1 and gateway.journal.copies() == []


def test_what_zulip_lost_is_bounded_too_and_the_alarm_comes_first(gateway):
    store = gateway.quarantine
    store._max_bytes = 10 * disk_space(4)
    for number in range(8):
        lose(gateway, b"%04d" % number)
    assert store.tidy_lost() == []
    lose(gateway, b"0008")
    oldest = [copy.id for copy in gateway.journal.copies()]
    [alarm] = store.tidy_lost()
    assert alarm.startswith("the copies of mail that Zulip has lost take 0 of 0 MiB; the next to be removed: ")
    assert [name in alarm for name in oldest] == [True] * 5 + [False] * 4 and TOKEN not in alarm
    assert store.tidy_lost() == []  # once a day is enough
    lose(gateway, b"0009")
    lose(gateway, b"0010")
    assert store.tidy_lost() == []  # nothing goes before somebody had a day to look at it
    with gateway.journal.change() as database:
        gateway.journal.write_note(database, "lost mail", {"first": time.time() - 90_000, "last": time.time()})
    [removed] = store.tidy_lost()
    assert removed.startswith(f"removed for want of space: {oldest[0]}, 4 bytes of ")
    assert [copy.id for copy in gateway.journal.copies()][:8] == oldest[1:]
    # In a flood of them there is no time; the last one stays, large as it may be.
    with gateway.journal.change() as database:
        gateway.journal.write_note(database, "lost mail", None)
    store._max_bytes = 1
    assert store.tidy_lost()[0].startswith("the copies of mail that Zulip has lost")
    [copy] = gateway.journal.copies()
    assert b"".join(store.pieces(copy.id)) == b"0010"


def test_small_copies_count_as_what_they_take_on_the_disk(gateway):
    """A block, their envelope and their row, not their few bytes; and they displace nothing that Zulip lost."""
    gateway.quarantine._max_bytes = 10 * 5000
    lose(gateway, b"lost")
    for number in range(30):
        keep(gateway, b"%d" % number)
    copies = gateway.journal.copies()
    assert copies[0].lost and 8 <= len(copies) - 1 <= 11
    files = list(gateway.quarantine.folder.iterdir())
    assert len(files) == len(copies) and sum(path.stat().st_blocks * 512 for path in files) <= 12 * 5000


def test_copies_outlive_the_journal(gateway):
    """Their first lines tell what the index did; half of a copy goes."""
    kept = [keep(gateway, b"one"), keep(gateway, b"two")]
    lose(gateway, b"three")
    before = gateway.journal.copies()
    (gateway.quarantine.folder / "half.mail.new").write_bytes(b"{")
    for path in gateway.config.state_dir.glob("journal*"):
        path.unlink()
    gateway.quarantine.reindex()
    after = [copy._replace(refused=0) for copy in gateway.journal.copies()]
    assert after == [copy._replace(refused=0) for copy in before] and before[:2] == kept and len(before) == 3
    assert len(list(gateway.quarantine.folder.iterdir())) == 3


def test_where_the_journal_begins_anew_a_copy_that_is_just_stored_is_left_alone(gateway):
    """The half of it was removed, and its mail deferred; the whole was taken up before its own thread did."""
    old = keep(gateway, b"old")
    for path in gateway.config.state_dir.glob("journal*"):
        path.unlink()
    assert gateway.journal.copies() == [] and gateway.journal.began_anew()
    half = gateway.quarantine.folder / "half.mail.new"
    half.write_bytes(b"{")
    new = gateway.quarantine.store(mail(b"new"), Mail(b"x" * 32, "postfix", CHANNEL, "s@x", "Q", 3), "why")
    gateway.quarantine.reindex(since=gateway.journal.note("since"))
    assert [copy.id for copy in gateway.journal.copies()] == [old.id]
    assert half.exists() and gateway.quarantine.path(new).exists()


@pytest.mark.parametrize("most", [2**30, 2**20])
def test_many_copies_cost_a_refusal_nothing(gateway, monkeypatch, most):
    """It neither reads the folder nor the whole index, also where there are too many."""
    monkeypatch.setattr(os, "fsync", lambda _: None)

    def cost() -> float:
        started = time.process_time()
        for _ in range(10):
            keep_one(gateway)
        return time.process_time() - started

    usual = min(cost() for _ in range(3))
    gateway.quarantine._max_bytes = most
    with gateway.journal.change() as database:
        database.executemany(
            "INSERT INTO mail (source, recipient, sender, queue_id, size, state, received, changed, copy)"
            " VALUES ('postfix', 'x', '', '', 1, 'refused', 1, 1, ?)",
            ((str(number),) for number in range(20_000)),
        )
    assert min(cost() for _ in range(3)) < 4 * usual


def keep_one(gateway):
    gateway.answers = [Refused("5.1.1", "unknown address", "no")]
    gateway.deliver(Envelope(CHANNEL), mail(b"x"))


@pytest.mark.parametrize(
    "verdict",
    [
        Delivered("accepted"),
        Deferred("4.3.2", "HTTP 502", "Zulip is in trouble"),
        Refused("5.1.1", "unknown", "no such"),
    ],
)
def test_a_client_understands_what_it_is_told(verdict):
    status, _, rest = answer(verdict).partition(" ")
    line, cause, _ = rest.split("\n")
    assert understood(int(status), line, cause) == verdict


def test_a_bug_is_told_with_its_place():
    try:
        raise KeyError("x" + TOKEN)
    except KeyError as error:
        verdict = bug(error)
    assert verdict.status == "4.3.0" and "test_gateway.py" in verdict.reason and TOKEN not in verdict.reason


FROM_INBOX = Envelope(CHANNEL, source="inbox", known_by=("inbox", "one", "1"))
COPIES = (
    b"Delivered-To: a\r\nMessage-ID: <1@example.org>\r\nDate: d\r\nFrom: a\r\nSubject: s\r\n\r\nText",
    b"Received: x\r\nDelivered-To: b\r\nDate: d\r\nFrom: a\r\nMessage-ID: <1@example.org>\r\nSubject: s\r\n\r\nText",
)


def test_copies_of_one_mail_in_an_inbox_are_posted_once_to_each_address(gateway):
    """A provider may keep one for each recipient."""
    gateway.answers = [POSTED]
    for number, text in enumerate(COPIES):
        verdict = gateway.deliver(FROM_INBOX._replace(known_by=("inbox", "one", str(number))), mail(text))
        assert isinstance(verdict, Delivered)
    assert len(gateway.handed) == 1
    other = CHANNEL.replace(TOKEN, TOKEN[::-1])
    gateway.deliver(FROM_INBOX._replace(known_by=("inbox", "one", "2"), recipient=other), mail(COPIES[0]))
    assert len(gateway.handed) == 2


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (COPIES[0], COPIES[0].replace(b"Text", b"Test")),
        (COPIES[0], COPIES[0].replace(b"<1@", b"<2@")),
        (COPIES[0], COPIES[0].replace(b"Subject: s", b"Subject: t")),
        (COPIES[0].replace(b"Message-ID", b"X"), COPIES[0].replace(b"Message-ID", b"X")),
        (COPIES[0].replace(b"Date", b"X"), COPIES[0].replace(b"Date", b"X")),
    ],
)
def test_what_may_be_another_mail_is_posted(gateway, one, other):
    gateway.answers = [POSTED]
    for number, text in enumerate((one, other)):
        gateway.deliver(FROM_INBOX._replace(known_by=("inbox", "one", str(number))), mail(text))
    assert len(gateway.handed) == 2


def test_a_copy_of_what_was_refused_is_tried(gateway):
    """Somebody may have moved it back into the inbox."""
    gateway.answers = [Refused("5.1.1", "unknown address", "no")]
    gateway.deliver(FROM_INBOX, mail(COPIES[0]), keep_refused=False)
    gateway.answers = [POSTED]
    assert gateway.deliver(FROM_INBOX._replace(known_by=("inbox", "one", "2")), mail(COPIES[0])) == POSTED


RESTRICTED = {"aliases": {"ops": Target(TOKEN, "#ops")}, "senders": {"ops": ("@example.net",)}}


def restricted(gateway):
    gateway.config = gateway.config._replace(addresses=gateway.config.addresses._replace(**RESTRICTED))
    return Envelope("ops@mail.example.com", "a@example.net", "Q1", "postfix")


def test_an_alias_leads_to_its_channel_and_shows_nothing_of_it(gateway):
    gateway.answers = [Delivered()]
    assert gateway.deliver(restricted(gateway), mail(b"From: b@example.net\n\nm")) == POSTED
    assert [recipient for recipient, _ in gateway.handed] == [f"{TOKEN}@mail.example.com"]


@pytest.mark.parametrize(
    ("sender", "author", "source"),
    [
        ("a@example.org", "a@example.net", "postfix"),
        ("a@example.net", "a@example.org", "postfix"),
        ("", "a@example.net", "postfix"),
        ("", "a@example.org", "inbox"),
    ],
)
def test_who_is_not_listed_is_told_so(gateway, sender, author, source):
    envelope = restricted(gateway)._replace(sender=sender, source=source)
    verdict = gateway.deliver(envelope, mail(f"From: {author}\n\nm".encode()))
    assert verdict == Refused("5.7.1", "sender not listed", "only certain senders may write to this address")
    assert gateway.handed == []
    assert gateway.deliver(envelope._replace(source="operator"), mail(f"From: {author}\n\nm".encode())) == POSTED


def test_an_alias_whose_channel_is_gone_delays_its_mail(gateway):
    gateway.answers = [Refused("5.1.1", "unknown address", "no such channel")]
    envelope = restricted(gateway)
    for _ in range(2):
        verdict = gateway.deliver(envelope, mail(b"From: b@example.net\n\nm"))
        assert isinstance(verdict, Deferred) and "run playbooks/site.yml" in verdict.reason
    gateway.answers = [Delivered()]
    assert gateway.deliver(envelope, mail(b"From: b@example.net\n\nm")) == POSTED


@pytest.mark.parametrize(
    ("sender", "header", "is_dropped"),
    [("", b"", True), ("a@b", b"Auto-Submitted: auto-replied\n", True), ("a@b", b"", False)],
)
def test_what_comes_to_zulips_own_sender(gateway, sender, header, is_dropped):
    book = gateway.config.addresses._replace(sends_from=("noreply@mail.example.com",))
    gateway.config = gateway.config._replace(addresses=book)
    envelope = Envelope("noreply@mail.example.com", sender, "Q1", "postfix")
    verdict = gateway.deliver(envelope, mail(header + b"From: a@b\n\nm"))
    if is_dropped:
        assert isinstance(verdict, Delivered) and verdict.cause == "dropped"
    else:
        assert isinstance(verdict, Refused) and "Zulip only sends from this address" in verdict.reason
    assert gateway.handed == []


def checked(dmarc: str, body: bytes = b"Hello", domain: bytes = b"example.net") -> Message:
    field = b"X-Zulip-Email-Gateway-Sender: dmarc=%s spf=fail domain=%s\n" % (dmarc.encode(), domain)
    return mail(field + b"From: a@example.net\n\n" + body)


@pytest.mark.parametrize("source", ["postfix", "operator", "zulip"])
@pytest.mark.parametrize("mode", ["off", "mark", "enforce"])
def test_a_forged_sender_is_warned_of(gateway, mode, source):
    gateway.config = gateway.config._replace(sender_checks=mode)
    assert gateway.deliver(FROM_POSTFIX._replace(source=source), checked("fail-quarantine")) == POSTED
    [(_, text)] = gateway.handed
    line = b"**Warning: the sender of this mail may be forged; example.net does not vouch for it (DMARC).**\r\n\r\n"
    assert text.endswith(b"\n\n" + (line if mode != "off" else b"") + b"Hello")


@pytest.mark.parametrize(("dmarc", "words"), [("pass", b""), ("none", b""), ("temperror", b"could not be checked")])
def test_who_is_not_warned_of(gateway, dmarc, words):
    """What DNS did not tell when the mail came will not be told later: the mail does not wait for it."""
    gateway.config = gateway.config._replace(sender_checks="enforce")
    assert gateway.deliver(FROM_POSTFIX, checked(dmarc)) == POSTED
    assert (b"Warning" in gateway.handed[0][1]) == bool(words) and words in gateway.handed[0][1]


def test_a_forged_sender_is_refused_by_the_delivery_too(gateway):
    """The service need not have been there when the mail came."""
    gateway.config = gateway.config._replace(sender_checks="enforce")
    verdict = gateway.deliver(FROM_POSTFIX, checked("fail-reject"))
    assert isinstance(verdict, Refused) and "where example.net says" in verdict.reason and gateway.handed == []


def test_what_cannot_be_warned_of_is_refused(gateway):
    gateway.config = gateway.config._replace(sender_checks="mark")
    field = b"X-Zulip-Email-Gateway-Sender: dmarc=fail-reject spf=fail domain=example.net\n"
    text = b"From: a@example.net\nContent-Transfer-Encoding: x-uuencode\n\nbegin 644 x\n#0V%T\n`\nend\n"
    verdict = gateway.deliver(FROM_POSTFIX, mail(field + text))
    assert isinstance(verdict, Refused) and "no warning can be put into it" in verdict.reason
    assert gateway.handed == [] and units(gateway) == []
    # Who has looked at it may want it all the same.
    assert gateway.deliver(Envelope(CHANNEL), mail(field + text)) == POSTED


def test_a_bug_while_a_mail_is_made_ready_keeps_no_place(gateway, monkeypatch):
    monkeypatch.setattr(gateway_module, "postable", lambda *_: 1 / 0)
    for _ in range(3):
        assert isinstance(gateway.deliver(FROM_POSTFIX, mail(b"m")), Deferred)
    assert units(gateway) == []


def test_with_a_warning_quotations_stay(gateway):
    """It would be the only text, else, of a mail of nothing but these."""
    gateway.config = gateway.config._replace(sender_checks="mark")
    assert gateway.deliver(FROM_POSTFIX, checked("fail-reject", b"> Hello\n")) == POSTED
    assert gateway.handed[0][0].partition("@")[0].endswith(".include-quotes")


def test_an_inbox_is_not_gone_by_what_stands_in_its_mail(gateway):
    gateway.config = gateway.config._replace(sender_checks="enforce")
    envelope = FROM_POSTFIX._replace(source="inbox", known_by=("inbox", "1"))
    assert gateway.deliver(envelope, checked("fail-reject")) == POSTED
    assert b"Warning" not in gateway.handed[0][1]
