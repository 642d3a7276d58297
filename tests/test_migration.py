"""What earlier versions of the gateway have left is taken over, once."""

from __future__ import annotations

import json
import time

import pytest
from email_gateway import migration
from email_gateway.failures import mark_of
from email_gateway.gateway import Gateway
from email_gateway.journal import Journal, key_of
from mails import mail
from test_config import make_config

NOW = time.time()
STATE = {
    "since": NOW - 86400,
    "slots": [
        {"id": 1, "opened": NOW - 9, "handed": NOW - 9, "consumed": NOW - 8, "doubt": False},
        {"id": 2, "opened": NOW - 1, "handed": None, "consumed": None, "doubt": False},
    ],
    "counts": {"delivered": {"accepted": 7}, "deferred": {"HTTP 502": 2}},
    "endpoint": "/api/internal/email_mirror_message",
    "accepted": [["zulip@example.com imap.example.com INBOX 7", 12]],
}
ITEM = {
    **{"id": "20260101T000000-00", "recipient": "r@x", "sender": "s\udcf6@x", "queue_id": "Q", "reason": "no"},
    **{"refused": 1.5, "size": 8},
}


@pytest.fixture
def gateway(tmp_path):
    made = Gateway(make_config(tmp_path), Journal(tmp_path))
    (tmp_path / "state.json").write_text(json.dumps(STATE))
    (tmp_path / "state.lock").touch()
    again = [mark_of("r@x", mail(b"text"))]
    recovery = {"inode": 5, "offset": 77, "done": 0, "again": again, "counts": {"handed over again": 3}}
    (tmp_path / "recovery.json").write_text(json.dumps({"recovery": recovery}))
    folder = tmp_path / "quarantine"
    folder.mkdir()
    for name, lost in (("a", True), ("b", False)):
        (folder / f"{name}.json").write_text(json.dumps({**ITEM, "id": name, "lost": lost}))
        (folder / f"{name}.eml").write_bytes(b"the mail")
    (folder / "c.json").write_text("{half")
    (folder / "c.eml").write_bytes(b"of a damaged one")
    (folder / "d.json").write_text(json.dumps(ITEM))  # without its message
    return made


def test_everything_is_taken_over(gateway, tmp_path):
    migration.run(tmp_path, gateway)
    gateway.quarantine.reindex()
    journal = gateway.journal
    assert journal.counts() == {
        **STATE["counts"],
        "failed inside zulip": {"handed over again": 3},
    }
    first, second = journal.units(0)
    assert (first.opened, first.consumed) == (NOW - 9, NOW - 8) and second.consumed >= NOW
    assert (journal.note("since"), journal.note("endpoint")) == (STATE["since"], STATE["endpoint"])
    assert not journal.note("consumption unknown")
    (inbox, uid) = STATE["accepted"][0]
    assert journal.delivered([key_of("inbox", inbox, str(uid), b"")]) == [True]
    position = json.loads((tmp_path / "failures-position.json").read_text())
    assert position == {"inode": 5, "offset": 77, "generation": 0}
    assert journal.was_handed_over_again(mark_of("r@x", mail(b"text")))
    assert [(one.id, one.lost) for one in journal.copies()] == [("a", True), ("b", False), ("c", False)]
    assert b"".join(gateway.quarantine.pieces("a")) == b"the mail"
    assert b"".join(gateway.quarantine.pieces("c")) == b"of a damaged one"
    left = sorted(path.name for path in tmp_path.rglob("*") if path.is_file() and "journal" not in path.name)
    assert left == ["a.mail", "b.mail", "c.mail", "credential", "failures-position.json", "workers.log"]


def test_a_second_run_changes_nothing(gateway, tmp_path):
    for _ in range(2):
        migration.run(tmp_path, gateway)
    assert gateway.journal.counts()["delivered"] == {"accepted": 7}


def test_interrupted_it_is_done_by_the_next_one(gateway, tmp_path, monkeypatch):
    """Killed in the middle of the quarantine."""
    write, calls = type(gateway.quarantine).write, []

    def killed(self, *arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(self, *arguments)

    monkeypatch.setattr(type(gateway.quarantine), "write", killed)
    with pytest.raises(KeyboardInterrupt):
        migration.run(tmp_path, gateway)
    monkeypatch.undo()
    test_everything_is_taken_over(gateway, tmp_path)


WRONG = [
    {"slots": [{}], "counts": {}},
    {**STATE, "counts": 7},
    {**STATE, "slots": [{**STATE["slots"][0], "opened": {}}]},
]


@pytest.mark.parametrize("state", ["{half", "[]", *(json.dumps(wrong) for wrong in WRONG)])
def test_a_damaged_state_says_nothing_of_the_last_hour(gateway, tmp_path, state):
    (tmp_path / "state.json").write_text(state)
    migration.run(tmp_path, gateway)
    assert gateway.journal.note("consumption unknown") and not (tmp_path / "state.json").exists()
