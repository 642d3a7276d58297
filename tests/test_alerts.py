"""What the operator is told in Zulip."""

from __future__ import annotations

import time

import pytest
from email_gateway.alerts import MOST, Alerts
from email_gateway.gateway import Envelope
from email_gateway.journal import add_to_count
from email_gateway.verdict import Deferred, Delivered, Refused
from mails import mail
from test_gateway import CHANNEL
from test_outcome import TO_GENERAL

ADDRESS = f"ops.{'f' * 32}@mail.example.com"


@pytest.fixture
def told(gateway):
    """Run once; the texts that were posted."""
    book = gateway.config.addresses._replace(alerts=ADDRESS, probe=CHANNEL)
    gateway.config = gateway.config._replace(addresses=book)

    def run(later: float = 0.0) -> list[str]:
        before = len(gateway.handed)
        Alerts(gateway, lambda: time.time() + later).run()
        posted = gateway.handed[before:]
        assert all(recipient == ADDRESS for recipient, _ in posted)
        return [text.decode().partition("\n\n")[2].strip() for _, text in posted]

    return run


def note_probe(gateway, seconds) -> None:
    with gateway.journal.change() as database:
        gateway.journal.write_note(database, "probe", {"looked": time.time(), "seconds": seconds})


def test_nothing_to_tell(gateway, told):
    note_probe(gateway, 0.7)
    assert told() == []


def test_once_and_once_more_when_it_is_over(gateway, told):
    note_probe(gateway, None)
    assert told() == [
        "A mail that was sent to see whether mail works was not posted in time: zulip-email-gateway doctor"
    ]
    assert told() == told(7200) == []
    note_probe(gateway, 0.7)
    assert told() == ["The mail that was sent to see whether mail works was posted"]
    assert told() == []


def test_mail_that_zulip_has_lost(gateway, told):
    gateway.tells = []
    gateway.deliver(Envelope(CHANNEL, source="postfix", known_by=("x",)), mail(b"m"))
    assert told() == []  # it waits
    with gateway.journal.change() as database:
        database.execute("UPDATE mail SET state = 'refused' WHERE lost = 1")
    for flight in gateway.journal.flights():
        gateway.outcomes.forget(gateway.outcomes.flight(flight.key))
    gateway.tells = [TO_GENERAL]
    [text] = told()
    assert text.startswith("Zulip has accepted 1 mails and not posted them")


def test_mail_that_waits(gateway, told):
    gateway.journal.queue([b"x" * 16], "Q")
    assert told(3000) == []
    assert told(4000) == ["Mail waits for more than 1 hour: zulip-email-gateway status says why"]
    with gateway.journal.change() as database:
        gateway.journal.dequeue(database, b"x" * 16, "Q", True, 0)
    assert told(4100) == ["No mail waits for long any more"]


@pytest.mark.parametrize(
    ("usual", "number", "is_told"), [(0, 21, True), (0, 20, False), (1680, 79, False), (1680, 81, True)]
)
def test_refusals_beyond_the_usual(gateway, told, usual, number, is_told):
    hour = int(time.time() // 3600)
    with gateway.journal.change() as database:
        add_to_count(database, "refused", "x", number, hour)
        add_to_count(database, "refused", "x", usual, hour - 100)
        gateway.journal.write_note(database, "since", time.time() - 14 * 86400)
    assert [f"{number} mails were refused within two hours" in text for text in told()] == [True] * is_told


def test_a_certificate_that_expires(gateway, told):
    for days, is_told in ((3, True), (30, True), (30, False)):
        with gateway.journal.change() as database:
            gateway.journal.write_note(database, "certificate until", time.time() + days * 86400)
        texts = told()
        assert bool(texts) == is_told
        assert not texts or ("expires within 7 days" in texts[0]) == (days == 3)


def test_what_cannot_be_posted_now_is_posted_later(gateway, told):
    note_probe(gateway, None)
    gateway.answers = [Deferred("4.3.2", "down", "Zulip is down")]
    told()
    gateway.answers = [Delivered()]
    assert len(told()) == 1 and told() == []


def test_each_twice_a_day(gateway, told):
    """And none at the expense of another."""
    texts = []
    for number in range(8 * MOST):
        note_probe(gateway, None if number % 2 == 0 else 0.7)
        texts += told(number)
    assert [text.split()[-1] == "doctor" for text in texts] == [True, False] * MOST
    gateway.journal.queue([b"x" * 16], "Q")
    assert len(told(4000)) == 1
    note_probe(gateway, None)
    assert told(5000) == [] and len(told(90_000)) == 1


@pytest.mark.parametrize("verdict", [Deferred("4.3.2", "down", "Zulip is down"), Refused("5.7.1", "x", "not allowed")])
def test_one_that_is_not_posted_is_tried_alone_and_not_forgotten(gateway, told, verdict):
    note_probe(gateway, None)
    gateway.journal.queue([b"x" * 16], "Q")
    gateway.answers = [verdict]
    later = time.time() + 4000
    assert Alerts(gateway, lambda: later).run()[1] == verdict and len(gateway.handed) == 1
    gateway.answers = [Delivered()]
    assert len(told(4000)) == 2


def test_a_certificate_that_nobody_can_see_was_not_renewed(gateway, told):
    def note(until):
        with gateway.journal.change() as database:
            gateway.journal.write_note(database, "certificate until", until)

    note(time.time() + 86400)
    assert len(told()) == 1
    note(None)
    assert told() == []
    note(time.time() + 60 * 86400)
    assert told() == ["The certificate was renewed"]


def test_where_nobody_wants_them_there_are_none(gateway):
    note_probe(gateway, None)
    assert Alerts(gateway).run() == ([], None) and gateway.handed == []
