"""What became of a mail inside Zulip, by the lines of its worker."""

from __future__ import annotations

import os
import threading
import time
from contextlib import contextmanager

import pytest
from email_gateway import failures as failures_module
from email_gateway import gateway as module
from email_gateway import late, outcome, worker_log
from email_gateway.address_book import AddressBook
from email_gateway.addresses import Pattern
from email_gateway.backend_http import HttpBackend
from email_gateway.failures import Failures
from email_gateway.gateway import Envelope, Gateway
from email_gateway.journal import Journal
from email_gateway.verdict import WAITING, Deferred, Delivered, Refused, Trouble
from email_gateway.worker_log import Follower
from mails import BEFORE, POSTED, eventually, line, mail, tell
from test_addresses import TOKEN
from test_config import made_logs
from test_failures import line as failed_line
from test_gateway import CHANNEL, FROM_POSTFIX, REPLY, units

TO_GENERAL = "Successfully processed email to general (zulip)"
A_REPLY = "Successfully processed email from user 9 to general"
FROM_REPLY = FROM_POSTFIX._replace(recipient=REPLY, known_by=("postfix", "QID", REPLY))
RESTARTS = "*** Sending self SIGUSR1 to trigger a restart."
FAILS = "Problem handling data on queue email_mirror\nTraceback (most recent call last):"


def when_handed(gateway, work):
    """Do something as soon as Zulip has been given the next mail."""
    number = len(gateway.handed) + 1
    threading.Thread(target=lambda: eventually(lambda: len(gateway.handed) == number) and work()).start()


@pytest.fixture
def patient(monkeypatch):
    """However late a line comes on a busy machine: of mail whose outcome is told."""
    for name in ("PROMPT", "DOUBTFUL", "_SECOND_THOUGHT"):
        monkeypatch.setattr(outcome, name, 20.0)


def delivered_at_a_time(gateway, recipient, contents):
    """Threads that deliver a mail each, in this order; by content their verdicts."""
    verdicts = {}
    threads = [
        threading.Thread(target=lambda one=one: verdicts.update({one: gateway.deliver(Envelope(recipient), mail(one))}))
        for one in contents
    ]
    before = len(gateway.handed)
    for number, thread in enumerate(threads, before + 1):
        thread.start()
        assert eventually(lambda number=number: len(gateway.handed) == number)
    return threads, verdicts


@pytest.mark.parametrize(
    ("recipient", "texts", "kind", "cause", "words", "used"),
    [
        (CHANNEL, [TO_GENERAL], Delivered, "posted", "posted in Zulip", 1),
        (REPLY, [A_REPLY], Delivered, "posted", "posted in Zulip", 0),
        (CHANNEL, ["Email has no nonempty body sections; ignoring."], Refused, "no text", "or nothing but quoted", 1),
        (REPLY, ["Email has no nonempty body sections; ignoring."], Refused, "no text", "nothing but quoted text", 0),
        (
            CHANNEL,
            ["Content types: ['application/pdf']", "Unable to find plaintext or HTML message body"],
            *(Refused, "no text", "Zulip finds no text in it", 1),
        ),
        (
            CHANNEL,
            ["Failed to process email to a (b): c (zulip): Not authorized to send to channel 'a'"],
            *(Refused, "not allowed", "Not authorized to send to channel", 1),
        ),
        (
            CHANNEL,
            ["Error queueing internal message by emailgateway@zulip.com: Channel is archived", TO_GENERAL],
            *(Refused, "not allowed", "Channel is archived", 1),
        ),
        (REPLY, ["Sending user is not active. Ignoring this"], Refused, "inactive user", "deactivated", 0),
        (CHANNEL, ["Sender: x\nTo: XXXX@mail.example.com <Invalid address>"], Refused, "unknown address", "is gone", 1),
        (REPLY, ["Dropping auto-replied message from x"], Delivered, "dropped", "automatic reply", 0),
        (
            CHANNEL,
            ["MirrorWorker: Rejecting an email from: x to realm: zulip - rate limited."],
            *(Deferred, "rate limit", "by its own account", 0),
        ),
        (
            CHANNEL,
            ["Timed out ingesting message-id <1@x> to XXXX (12 bytes) -- dropping!"],
            *(Deferred, "Zulip's time limit", "is Zulip slow", 1),
        ),
        (CHANNEL, [FAILS], Deferred, "failed in Zulip", "look at its errors.log", 1),
    ],
)
def test_each_line_is_a_verdict(gateway, recipient, texts, kind, cause, words, used):
    gateway.tells = texts
    envelope = FROM_POSTFIX._replace(recipient=recipient, known_by=("postfix", "QID", recipient))
    verdict = gateway.deliver(envelope, mail(b"m"))
    text = verdict.note if isinstance(verdict, Delivered) else verdict.reason
    assert (type(verdict), verdict.cause) == (kind, cause) and words in text
    assert gateway.journal.counts() == {kind.__name__.lower(): {cause: 1}}
    assert len(units(gateway)) == used and all(unit.consumed for unit in units(gateway))
    assert len(gateway.journal.copies()) == (kind is Refused)
    assert gateway.journal.flights() == [] and gateway.outcomes.flight(b"") is None


def test_the_lines_time_is_when_zulip_counted_it(gateway, patient):
    """It is read later."""
    gateway.tells, told = [], []

    def work():
        told.append(time.time())
        time.sleep(0.1)
        with (gateway.config.logs / "workers.log").open("a") as file:
            file.write(line(told[0], TO_GENERAL))

    when_handed(gateway, work)
    gateway.deliver(FROM_POSTFIX, mail(b"m"))
    assert units(gateway)[0].consumed == pytest.approx(told[0], abs=0.002)


def failed_now(text=b"m"):
    """A line of Zulip's file of failed mail."""
    return time.asctime(time.gmtime()) + "\t" + failed_line(text).partition("\t")[2]


def is_waiting(verdict):
    return isinstance(verdict, Delivered) and verdict.cause == WAITING


def test_without_a_line_a_copy_is_kept_until_it_comes(gateway):
    gateway.tells = []
    assert is_waiting(gateway.deliver(FROM_POSTFIX, mail(b"the mail")))
    [copy] = gateway.journal.copies()
    assert copy.waits and b"".join(gateway.quarantine.pieces(copy.id)) == b"the mail"
    assert gateway.journal.counts() == {} and gateway.journal.number_of_copies() == (1, 0, 1)
    assert late.take_up(gateway) == ([], None)
    assert isinstance(gateway.deliver(FROM_POSTFIX, mail(b"the mail")), Delivered) and len(gateway.handed) == 1
    tell(gateway.config.logs, TO_GENERAL)
    told, waits = late.take_up(gateway)
    assert "posted in Zulip" in told[0] and waits is None
    assert gateway.journal.copies() == [] and list(gateway.quarantine.folder.iterdir()) == []
    assert gateway.journal.counts() == {"delivered": {"posted": 1}} and gateway.journal.flights() == []
    assert gateway.deliver(FROM_POSTFIX, mail(b"the mail")) == BEFORE


def test_it_comes_after_a_restart_of_the_service(gateway):
    gateway.tells = []
    gateway.deliver(FROM_POSTFIX, mail(b"m"))
    after_restart = Gateway(gateway.config, Journal(gateway.config.state_dir))
    after_restart.outcomes.after_a_start()
    tell(gateway.config.logs, TO_GENERAL)
    assert "posted in Zulip" in late.take_up(after_restart)[0][0]


def test_what_zulip_makes_nothing_of_stays_and_is_told(gateway):
    gateway.tells = []
    gateway.deliver(FROM_POSTFIX, mail(b"m"))
    tell(gateway.config.logs, "Email has no nonempty body sections; ignoring.")
    late.take_up(gateway)
    [copy] = gateway.journal.copies()
    assert copy.lost and not copy.waits and "no text" in copy.reason
    assert gateway.journal.counts() == {"failed inside zulip": {"quarantined": 1}}
    assert gateway.journal.number_of_copies() == (1, 1, 0)


def test_told_late_that_there_are_only_quotations_it_keeps_them(gateway):
    gateway.tells = []
    gateway.deliver(FROM_POSTFIX, mail(QUOTED))
    tell(gateway.config.logs, NOTHING)
    gateway.tells = None
    assert "posted in Zulip" in late.take_up(gateway)[0][0]
    assert [recipient for recipient, _ in gateway.handed] == [CHANNEL, CHANNEL.replace("@", ".include-quotes@")]
    assert gateway.journal.copies() == []


def test_where_one_channel_has_no_room_another_may_have(gateway, monkeypatch):
    gateway.tells = []
    other = CHANNEL.replace(TOKEN, TOKEN[::-1])
    for number, recipient in enumerate((CHANNEL, CHANNEL, other)):
        with monkeypatch.context() as patch:
            patch.setattr(outcome, "_ONE_MORE", 0.0)
            gateway.deliver(Envelope(recipient, "", f"Q{number}", "postfix", (str(number),)), mail(b"m"))
    for _ in range(3):
        tell(gateway.config.logs, "Timed out ingesting message-id <1@x> to XXXX (1 bytes) -- dropping!")
    gateway.tells = None
    with gateway.journal.change() as database:
        for _ in range(40):
            ticket = gateway.journal.open_unit(database, time.time(), outcome.address_of(TOKEN))
            gateway.journal.settle_unit(database, ticket, time.time())
    monkeypatch.setattr(late, "_MAX_WAIT", 0.1)
    before = len(gateway.handed)
    told, waits = late.take_up(gateway)
    assert [recipient for recipient, _ in gateway.handed[before:]] == [other]
    assert len(told) == 1 and waits.cause == "rate limit"


@pytest.mark.parametrize("again", ["posted", "waits", "not now"])
def test_what_trouble_has_dropped_is_handed_over_again(gateway, again):
    gateway.tells = []
    gateway.deliver(FROM_POSTFIX, mail(b"m"))
    tell(gateway.config.logs, "Timed out ingesting message-id <1@x> to XXXX (1 bytes) -- dropping!")
    gateway.tells = None if again == "posted" else []
    if again == "not now":
        gateway.answers = [Deferred("4.3.2", "HTTP 502", "down"), Delivered()]
        assert late.take_up(gateway)[1].reason == "down" and len(gateway.journal.copies()) == 1
        gateway.tells = None
    late.take_up(gateway)
    assert len(gateway.handed) == (3 if again == "not now" else 2)
    if again == "waits":
        tell(gateway.config.logs, TO_GENERAL)
        late.take_up(gateway)
    assert gateway.journal.copies() == [] and gateway.journal.flights() == []
    assert late.take_up(gateway) == ([], None)


def test_one_that_has_to_wait_holds_up_none_that_was_posted(gateway):
    """Nor does one whose address has another form by now."""
    gateway.tells = []
    threads, _ = delivered_at_a_time(gateway, REPLY, [QUOTED + b"%d" % number for number in range(3)])
    for thread in threads:
        thread.join()
    tell(gateway.config.logs, TOO_LONG, NOTHING, A_REPLY)
    gateway.config = gateway.config._replace(addresses=AddressBook(Pattern("user+", "mail.example.com")))
    told, waits = late.take_up(gateway)
    assert waits.cause == "other pattern" and len(told) == 2
    assert "no text" in told[0] and "posted in Zulip" in told[1]
    assert gateway.journal.number_of_copies() == (2, 1, 1)


def test_without_room_for_a_copy_it_is_asked_for_again(gateway, monkeypatch):
    gateway.tells = []
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    verdict = gateway.deliver(FROM_POSTFIX, mail(b"m"))
    assert isinstance(verdict, Deferred) and "cannot keep a copy" in verdict.reason
    monkeypatch.undo()
    tell(gateway.config.logs, TO_GENERAL)
    assert gateway.deliver(FROM_POSTFIX, mail(b"m")) == POSTED and len(gateway.handed) == 1


def test_what_the_journal_could_not_be_told_is_told_later(gateway, monkeypatch):
    """The disk is full while lines come: none is forgotten, and none counts twice."""
    change = gateway.journal.change

    @contextmanager
    def full(sync=False):
        with change(sync) as database:
            yield database
            raise Trouble("4.3.0", "journal", "disk full")

    gateway.deliver(Envelope(CHANNEL), mail(b"m"))
    tell(gateway.config.logs, TO_GENERAL)
    monkeypatch.setattr(gateway.journal, "change", full)
    for _ in range(3):
        gateway.outcomes.read_log()
    assert len(units(gateway)) == 1
    monkeypatch.undo()
    for _ in range(3):
        gateway.outcomes.read_log()
    assert len(units(gateway)) == 2


def test_outcomes_that_nobody_asks_for_are_forgotten(gateway, monkeypatch):
    """The mail was removed from Postfix's queue."""
    gateway.tells = []
    gateway.stopping.set()
    gateway.deliver(FROM_REPLY, mail(b"m"))
    tell(gateway.config.logs, A_REPLY)
    gateway.tidy()
    assert len(gateway.journal.flights()) == 1
    later = time.time() + 15 * 86400
    monkeypatch.setattr(time, "time", lambda: later)
    gateway.tidy()
    assert gateway.journal.flights() == []


def test_while_the_worker_is_stopped_nothing_more_is_handed_over(gateway, monkeypatch):
    monkeypatch.setattr(module, "_LEAST_TURN", 0.7)  # longer than all that conftest.py has made short
    gateway.tells = []
    gateway.deliver(FROM_POSTFIX, mail(b"m"))
    for recipient in (CHANNEL, REPLY):
        verdict = gateway.deliver(Envelope(recipient), mail(b"m"), max_wait=0.1)
        assert verdict.cause == "worker" and "supervisorctl status" in verdict.reason and len(gateway.handed) == 1
    assert len(units(gateway)) == 1
    # But for one mail a minute, in case Zulip has lost the one before it.
    monkeypatch.setattr(outcome, "_ONE_MORE", 0.2)
    gateway.deliver(Envelope(REPLY), mail(b"m"))
    assert len(gateway.handed) == 2


def test_what_zulip_has_lost_holds_nothing_up(gateway, monkeypatch):
    gateway.tells = []
    gateway.deliver(FROM_POSTFIX, mail(b"lost"))
    monkeypatch.setattr(outcome, "_ONE_MORE", 0.2)
    monkeypatch.setattr(outcome, "PROMPT", 1.0)
    gateway.tells = None
    time.sleep(0.9)
    assert gateway.deliver(Envelope(CHANNEL), mail(b"m")) == POSTED
    told, _ = late.take_up(gateway)
    assert "said nothing of this mail" in told[0]
    [copy] = gateway.journal.copies()
    assert copy.lost and not copy.waits
    assert gateway.deliver(Envelope(CHANNEL), mail(b"m"), max_wait=0.1) == POSTED


def test_overdue_lines_are_matched_in_order(gateway):
    """The worker was stopped in the middle: the one that was handed over first was dropped."""
    gateway.tells = []
    threads, _ = delivered_at_a_time(gateway, REPLY, [b"0", b"1", b"2"])
    for thread in threads:
        thread.join()
    assert gateway.journal.number_of_copies() == (3, 0, 3)
    tell(gateway.config.logs, "Email has no nonempty body sections; ignoring.", A_REPLY, A_REPLY)
    late.take_up(gateway)
    [copy] = gateway.journal.copies()
    assert b"".join(gateway.quarantine.pieces(copy.id)) == gateway.handed[0][1]


def test_replies_at_a_time_are_told_apart_by_order(gateway, patient):
    gateway.tells = []
    threads, verdicts = delivered_at_a_time(gateway, REPLY, [b"0", b"1", b"2", b"3"])
    tell(gateway.config.logs, A_REPLY, "Sending user is not active. Ignoring this", A_REPLY, A_REPLY)
    for thread in threads:
        thread.join()
    assert [verdicts[text].cause for _, text in gateway.handed] == ["posted", "inactive user", "posted", "posted"]


def test_of_mail_to_channels_one_is_under_way_at_a_time(gateway, patient):
    gateway.tells = []
    [first], _ = delivered_at_a_time(gateway, CHANNEL, [b"1"])
    second = threading.Thread(target=lambda: gateway.deliver(Envelope(CHANNEL), mail(b"2")))
    second.start()
    time.sleep(0.1)
    assert len(gateway.handed) == 1
    gateway.tells = None
    tell(gateway.config.logs, TO_GENERAL)
    first.join()
    second.join()
    assert len(gateway.handed) == 2 and gateway.journal.copies() == []


def test_lines_of_others_are_counted_and_never_taken_for_ours(gateway, monkeypatch):
    monkeypatch.setattr(outcome, "_QUIET", 0.6)
    assert gateway.deliver(Envelope(CHANNEL), mail(b"m")) == POSTED  # it is called general
    tell(gateway.config.logs, TO_GENERAL, A_REPLY)
    gateway.tells = ["Successfully processed email to other (zulip)", A_REPLY]
    assert is_waiting(gateway.deliver(FROM_POSTFIX, mail(b"m")))
    time.sleep(0.7)  # nothing else comes: the channel was renamed
    assert "posted in Zulip" in late.take_up(gateway)[0][0]
    assert len(units(gateway)) == 3
    gateway.tells = ["Email has no nonempty body sections; ignoring.", "Successfully processed email to other (zulip)"]
    assert gateway.deliver(Envelope(CHANNEL), mail(b"m")) == POSTED
    assert len(units(gateway)) == 5


def test_with_a_share_of_its_own_a_host_does_not_count_the_others(gateway):
    """Their mail is in their share."""
    gateway.outcomes.follow(gateway.config.logs, counts_others=False)
    gateway.deliver(Envelope(CHANNEL), mail(b"m"))
    tell(gateway.config.logs, TO_GENERAL)
    gateway.deliver(Envelope(CHANNEL), mail(b"m"))
    assert len(units(gateway)) == 2


def test_another_folder_of_logs_takes_effect_at_once(gateway, tmp_path, patient):
    gateway.deliver(Envelope(CHANNEL), mail(b"m"))
    logs = made_logs(tmp_path / "others")
    successor = Gateway(gateway.config._replace(logs=logs), gateway.journal)
    successor.succeed(gateway)
    when_handed(gateway, lambda: tell(logs, TO_GENERAL))
    gateway.tells = []
    assert successor.deliver(Envelope(CHANNEL), mail(b"m")) == POSTED


def test_the_better_of_two_lines_is_ours(gateway, patient):
    gateway.deliver(Envelope(CHANNEL), mail(b"m"))
    gateway.tells = ["Successfully processed email to other (zulip)"]
    when_handed(gateway, lambda: (time.sleep(0.1), tell(gateway.config.logs, TO_GENERAL)))
    assert gateway.deliver(FROM_POSTFIX, mail(b"m")) == POSTED
    assert gateway.journal.place(outcome.address_of(TOKEN)) == "general (zulip)"


def test_another_producers_blank_mail_when_the_limit_is_used_up(gateway, patient):
    gateway.deliver(Envelope(CHANNEL), mail(b"m"))
    gateway.tells, told = [NOTHING], "MirrorWorker: Rejecting an email from: x to realm: zulip - rate limited."
    when_handed(gateway, lambda: (time.sleep(0.1), tell(gateway.config.logs, told)))
    assert gateway.deliver(FROM_POSTFIX, mail(b"m")).cause == "rate limit"


def test_a_dropped_mail_is_not_taken_for_posted_by_the_next_ones_line(gateway):
    """Two at a time to the same channel, as from Postfix and from the inbox."""
    gateway.deliver(Envelope(CHANNEL), mail(b"m"))
    gateway.tells = [NOTHING]
    [first], verdicts = delivered_at_a_time(gateway, CHANNEL, [b" "])
    gateway.tells = None
    second = gateway.deliver(Envelope(CHANNEL), mail(b"2"))
    first.join()
    assert (verdicts[b" "].cause, second) == ("no text", POSTED)


def test_another_mail_to_the_same_address_is_not_the_failed_one(gateway, monkeypatch):
    """Zulip had failed with it before this one was handed over."""
    monkeypatch.setattr(module, "_LEAST_TURN", 0.7)
    monkeypatch.setattr(failures_module, "_MAX_WAIT", 0.7)
    failures = Failures(gateway)
    failures.run()
    with gateway.config.queue_errors.open("a") as file:
        file.write(failed_line(b"old"))
    gateway.tells = []
    gateway.deliver(FROM_POSTFIX, mail(b"m"))
    assert failures.run()[1].cause == "worker"
    tell(gateway.config.logs, TO_GENERAL)
    late.take_up(gateway)
    gateway.tells = None
    assert "handed over again" in failures.run()[0][0] and gateway.handed[-1][1] == b"old"


def test_a_copy_that_the_journal_could_not_be_told_of_is_none(gateway, monkeypatch):
    gateway.tells = []

    def full(*_, **__):
        raise Trouble("4.3.0", "journal", "disk full")

    monkeypatch.setattr(gateway.journal, "finish", full)
    assert isinstance(gateway.deliver(FROM_POSTFIX, mail(b"m")), Deferred)
    monkeypatch.undo()
    tell(gateway.config.logs, TO_GENERAL)
    assert late.take_up(gateway) == ([], None)
    assert gateway.deliver(FROM_POSTFIX, mail(b"m")) == POSTED and len(gateway.handed) == 1


def test_one_success_between_two_failures_of_all_is_no_reason_to_refuse(gateway):
    gateway.tells = [TOO_LONG]
    for number in range(3):
        assert gateway.deliver(FROM_POSTFIX, mail(b"m")).cause == "Zulip's time limit", number
        gateway.deliver(Envelope(REPLY), mail(b"Auto-Submitted: auto-replied\n\n"))  # not posted by Zulip
    assert gateway.journal.copies() == []


def killed_in_the_hand_over(gateway, envelope):
    gateway.answers = [KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        gateway.deliver(envelope, mail(b"m"))
    gateway.answers = [Delivered()]
    return Gateway(gateway.config, Journal(gateway.config.state_dir))


@pytest.mark.parametrize("envelope", [FROM_POSTFIX, FROM_REPLY])
@pytest.mark.parametrize("reached", [True, False])
def test_killed_in_the_hand_over_the_line_tells(gateway, envelope, reached):
    restarted = killed_in_the_hand_over(gateway, envelope)
    if reached:
        tell(gateway.config.logs, TO_GENERAL if envelope is FROM_POSTFIX else A_REPLY)
    restarted.outcomes.after_a_start()
    restarted.pace.after_a_start()
    assert restarted.deliver(envelope, mail(b"m")) == POSTED
    assert len(gateway.handed) == (1 if reached else 2)


def test_killed_between_two_mails_the_second_is_not_taken_for_the_first(gateway):
    restarted = killed_in_the_hand_over(gateway, FROM_POSTFIX)
    restarted.outcomes.after_a_start()
    assert restarted.deliver(FROM_REPLY, mail(b"m")) == POSTED
    assert restarted.deliver(FROM_POSTFIX, mail(b"m")) == POSTED and len(gateway.handed) == 3


def test_a_hand_over_without_an_answer_is_settled_by_its_line(gateway, patient):
    gateway.answers = [Deferred("4.4.2", "no answer", "silent", in_doubt=True)]
    when_handed(gateway, lambda: (time.sleep(0.05), tell(gateway.config.logs, TO_GENERAL)))
    assert gateway.deliver(FROM_POSTFIX, mail(b"m")) == POSTED
    (unit,) = units(gateway)
    assert unit.consumed and not unit.doubt and gateway.journal.note("backoff") is None


def test_a_line_at_the_time_of_a_refusal_is_anothers(gateway, monkeypatch):
    def hand_over(*_: object) -> object:
        tell(gateway.config.logs, TO_GENERAL)
        gateway.outcomes.read_log()
        return Refused("5.1.1", "unknown address", "no")

    monkeypatch.setattr(HttpBackend, "hand_over", hand_over)
    assert isinstance(gateway.deliver(FROM_POSTFIX, mail(b"m")), Refused)
    gateway.outcomes.read_log()
    assert len(units(gateway)) == 1  # it counts all the same


@pytest.mark.parametrize("log", ["errors.log", "workers.log"])
def test_what_rabbitmq_gives_again_is_not_handed_over_again(gateway, log):
    gateway.tells = []
    failures = Failures(gateway)
    failures.run()
    when_handed(gateway, lambda: (tell(gateway.config.logs, FAILS), tell(gateway.config.logs, RESTARTS, log=log)))
    assert is_waiting(gateway.deliver(FROM_POSTFIX, mail(b"m")))
    with gateway.config.queue_errors.open("a") as file:
        file.write(failed_now())
    assert failures.run() == ([], None)
    assert late.take_up(gateway) == ([], None) and len(gateway.handed) == 1
    tell(gateway.config.logs, TO_GENERAL)
    assert "posted in Zulip" in late.take_up(gateway)[0][0] and gateway.journal.copies() == []
    assert failures.run() == ([], None) and len(gateway.handed) == 1


@pytest.mark.parametrize("has_a_line", [True, False])
def test_what_failed_and_is_deferred_is_not_handed_over_from_zulips_file(gateway, has_a_line):
    """Whoever brought it brings it again."""
    gateway.tells = [FAILS] if has_a_line else []
    failures = Failures(gateway)
    failures.run()
    verdict = gateway.deliver(FROM_POSTFIX, mail(b"m"))
    assert verdict.cause == ("failed in Zulip" if has_a_line else WAITING)
    with gateway.config.queue_errors.open("a") as file:
        file.write(failed_now())
    for _ in range(2):
        assert failures.run() == ([], None)
    assert len(gateway.handed) == 1
    gateway.tells = None
    if has_a_line:
        assert gateway.deliver(FROM_POSTFIX, mail(b"m")) == POSTED
    else:
        time.sleep(0.3)
        assert "posted in Zulip" in late.take_up(gateway)[0][0] and len(gateway.handed) == 2


QUOTED = b"Subject: Re: x\n\nOn Monday, y wrote:\n> hello\n"
NOTHING = "Email has no nonempty body sections; ignoring."


def test_a_mail_of_nothing_but_quotations_keeps_them(gateway, monkeypatch):
    """By the address's option; a reply address has none."""

    def hand_over(self, recipient, *_):
        gateway.handed.append(recipient)
        tell(gateway.config.logs, TO_GENERAL if "include-quotes" in recipient else NOTHING)
        return Delivered()

    monkeypatch.setattr(HttpBackend, "hand_over", hand_over)
    assert gateway.deliver(FROM_POSTFIX, mail(QUOTED)) == POSTED
    assert gateway.handed == [CHANNEL, CHANNEL.replace("@", ".include-quotes@")]
    assert len(units(gateway)) == 2 and gateway.journal.flights() == []
    for recipient, text in ((REPLY, QUOTED), (CHANNEL, b"\n \n")):
        assert gateway.deliver(Envelope(recipient), mail(text)).cause == "no text"
    assert len(gateway.handed) == 4


def test_a_mail_without_text_gets_some(gateway):
    pdf = b"Subject: x\nContent-Type: application/pdf\nContent-Transfer-Encoding: base64\n\nAAAA\n"
    assert gateway.deliver(FROM_POSTFIX, mail(pdf)) == POSTED
    assert b"(no text)" in gateway.handed[0][1] and b"AAAA" in gateway.handed[0][1]


TOO_LONG = "Timed out ingesting message-id <1@x> to XXXX (1 bytes) -- dropping!"


def test_a_mail_that_zulip_fails_with_alone_is_given_up(gateway):
    """It takes three places in the rate limit, not more."""
    gateway.tells = [TOO_LONG]
    for number in range(5):
        assert gateway.deliver(FROM_POSTFIX, mail(b"m")).cause == "Zulip's time limit", number
    gateway.tells = None  # it may be Zulip: until it takes another mail
    gateway.deliver(Envelope(REPLY), mail(b"another"))
    gateway.tells = [TOO_LONG]
    verdict = gateway.deliver(FROM_POSTFIX, mail(b"m"))
    assert isinstance(verdict, Refused) and "failed with it 3 times, and not with others" in verdict.reason
    assert len(gateway.journal.copies()) == 1


def test_while_zulip_takes_other_mail_it_is_given_up_at_the_third_time(gateway):
    verdicts = []
    for _ in range(3):
        gateway.tells = [TOO_LONG]
        verdicts.append(type(gateway.deliver(FROM_POSTFIX, mail(b"m"))))
        gateway.tells = None
        gateway.deliver(Envelope(REPLY), mail(b"another"))
    assert verdicts == [Deferred, Deferred, Refused]


def test_without_a_log_accepted_is_all_that_is_known(gateway):
    (gateway.config.logs / "workers.log").unlink()
    assert gateway.deliver(FROM_POSTFIX, mail(b"m")) == Delivered()
    assert gateway.journal.counts() == {"delivered": {"accepted": 1}} and units(gateway)[0].consumed
    # With its first line the log is there.
    assert gateway.deliver(Envelope(CHANNEL), mail(b"m")) == POSTED


def test_the_first_line_of_a_log_that_was_not_there(tmp_path):
    follower = Follower(tmp_path)
    assert kinds(follower) == []
    tell(tmp_path, A_REPLY)
    assert kinds(follower) == [worker_log.REPLY_POSTED]


# --- Reading the log


@pytest.fixture
def logs(tmp_path):
    (tmp_path / "workers.log").write_text(line(1.0, TO_GENERAL))
    return tmp_path


def kinds(follower):
    return [told.kind for told in follower.read()]


def test_what_stands_there_at_first_is_not_told(logs):
    follower = Follower(logs)
    assert kinds(follower) == []
    tell(logs, A_REPLY)
    assert kinds(follower) == [worker_log.REPLY_POSTED] and kinds(follower) == []


@pytest.mark.parametrize("is_open", [True, False])
def test_through_a_rotation(logs, is_open):
    follower = Follower(logs)
    follower.read()
    if not is_open:
        follower = Follower(logs, position=follower.position)
    tell(logs, "Email has no nonempty body sections; ignoring.")
    (logs / "workers.log").rename(logs / "workers.log.1")
    tell(logs, A_REPLY)
    assert kinds(follower) == [worker_log.NO_TEXT, worker_log.REPLY_POSTED]
    tell(logs, TO_GENERAL)
    assert kinds(follower) == [worker_log.POSTED]


def test_a_log_that_is_emptied(logs):
    follower = Follower(logs)
    follower.read()
    (logs / "workers.log").write_text("")
    assert kinds(follower) == []
    tell(logs, A_REPLY)
    assert kinds(follower) == [worker_log.REPLY_POSTED]


def test_half_a_line_waits_for_its_end(logs):
    follower = Follower(logs)
    follower.read()
    text = line(2.0, A_REPLY)
    with (logs / "workers.log").open("a") as file:
        file.write(text[:40])
        file.flush()
        assert kinds(follower) == []
        file.write(text[40:])
    assert kinds(follower) == [worker_log.REPLY_POSTED]


def test_another_log_is_followed_where_the_first_is_written_no_more(logs):
    follower = Follower(logs)
    follower.read()
    os.utime(logs / "workers.log", (1, 1))
    (logs / "events.log").touch()
    follower.read()
    tell(logs, A_REPLY, log="events.log")
    assert kinds(follower) == [worker_log.REPLY_POSTED]


def test_a_line_of_a_megabyte_is_none(logs):
    follower = Follower(logs)
    follower.read()
    with (logs / "workers.log").open("a") as file:
        file.write("x" * 3_000_000 + "\n" + line(3.0, TO_GENERAL))
    assert kinds(follower) == [worker_log.POSTED]


def test_text_within_a_line_tells_nothing(logs):
    follower = Follower(logs)
    follower.read()
    tell(logs, f"x {TO_GENERAL}", f"x\n{TO_GENERAL}", "Problem handling data on queue other")
    assert kinds(follower) == []
