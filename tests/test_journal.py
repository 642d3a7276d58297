"""The journal: what it remembers, and what becomes of it when it is damaged, gone or cannot be written."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from email_gateway import journal as module
from email_gateway.journal import NAME, Journal, Mail, key_of
from email_gateway.verdict import Deferred, Delivered, Refused, Trouble, Verdict

KEY = key_of("postfix", "QID", "general@x", b"digest")
MAIL = Mail(KEY, "postfix", "general." + "a1" * 16 + "@x", "user@example.org", "QID", 5)


def finish(journal: Journal, verdict: Verdict, mail: Mail = MAIL, copy: str | None = None) -> None:
    with journal.change(sync=True) as database:
        journal.finish(database, mail, verdict, copy)


def test_the_answer_stands_in_the_journal(tmp_path):
    journal = Journal(tmp_path)
    assert journal.verdict(KEY) is None
    with journal.change() as database:
        journal.begin(database, MAIL)
    assert journal.verdict(KEY) is None
    finish(journal, Deferred("4.3.2", "HTTP 502", "later"))
    assert journal.verdict(KEY) is None
    finish(journal, Delivered())
    journal.close()
    assert isinstance(Journal(tmp_path).verdict(KEY), Delivered)
    assert journal.counts() == {"deferred": {"HTTP 502": 1}, "delivered": {"accepted": 1}}


def test_a_refusal_is_told_again_in_the_same_words(tmp_path):
    journal, refused = Journal(tmp_path), Refused("5.1.1", "unknown address", "no such channel")
    finish(journal, refused)
    assert journal.verdict(KEY) == refused


def test_no_whole_address_stays_but_that_of_a_copy(tmp_path):
    journal = Journal(tmp_path)
    finish(journal, Delivered())
    finish(journal, Refused("5.1.1", "x", "y"), MAIL._replace(key=b"other"), copy="ID")
    with journal.change() as database:
        rows = [row[0] for row in database.execute("SELECT recipient FROM mail ORDER BY id")]
    assert rows == ["general.a1a1...@x", MAIL.recipient]
    journal.forget_copy("ID")
    assert journal.copies() == []
    assert b"a1" * 16 not in b"".join(
        str(row).encode() for row in sqlite3.connect(tmp_path / NAME).execute("SELECT * FROM mail")
    )


def test_keys_differ_where_parts_do():
    assert len({key_of("a", "bc"), key_of("ab", "c"), key_of("abc"), key_of("a", "bc", b"")}) == 4
    assert key_of("\udcff") != key_of("ÿ")  # an 8-bit sender


def test_a_mail_is_remembered_while_it_is_asked_for(tmp_path, monkeypatch):
    journal = Journal(tmp_path)
    finish(journal, Delivered())
    for day in range(0, 60, 5):
        monkeypatch.setattr(time, "time", lambda day=day: 2e9 + day * 86400)
        if day == 0:
            finish(journal, Delivered())
        assert journal.delivered([KEY, b"other"]) == [True, False]
        journal.tidy(1000)
    monkeypatch.setattr(time, "time", lambda: 2e9 + 100 * 86400)
    journal.tidy(1000)
    assert journal.delivered([KEY]) == [False]


@pytest.mark.parametrize("garbage", [b"no database at all" * 1000, b""])
def test_a_damaged_journal_is_moved_aside(tmp_path, garbage):
    journal = Journal(tmp_path)
    finish(journal, Delivered())
    journal.close()
    (tmp_path / NAME).write_bytes(garbage)
    journal = Journal(tmp_path)
    if garbage:
        with pytest.raises(Trouble, match="is damaged and was moved aside"):
            journal.verdict(KEY)
        (name,) = journal.damaged()
        assert (tmp_path / name).read_bytes() == garbage
    assert journal.verdict(KEY) is None and journal.note("consumption unknown")
    finish(journal, Delivered())


def test_a_journal_damaged_in_the_middle_is_moved_aside_too(tmp_path):
    journal = Journal(tmp_path)
    for number in range(2000):
        finish(journal, Delivered(), MAIL._replace(key=str(number).encode()))
    journal.close()
    with open(tmp_path / NAME, "r+b") as file:
        file.seek(os.path.getsize(tmp_path / NAME) // 2)
        file.write(os.urandom(60000))
    journal = Journal(tmp_path)
    with pytest.raises(Trouble, match="is damaged"):
        journal.verdict(KEY)
    assert journal.verdict(KEY) is None


def test_a_journal_that_is_removed_begins_anew(tmp_path):
    journal = Journal(tmp_path)
    finish(journal, Delivered())
    for path in tmp_path.glob(f"{NAME}*"):
        path.unlink()
    assert journal.verdict(KEY) is None and journal.note("consumption unknown")


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files to other users, which takes root")
def test_what_cannot_be_written_is_said_and_works_again_afterwards(tmp_path):
    """As the gateway's user: root writes everywhere."""
    script = """
import os, sys
sys.path.insert(0, sys.argv[2])
os.setuid(65534)
from pathlib import Path
from email_gateway.journal import Journal, Mail
from email_gateway.verdict import Delivered, Trouble
journal = Journal(Path(sys.argv[1]))
for line in sys.stdin:
    try:
        with journal.change() as database:
            journal.finish(database, Mail(None, "operator", "x", "", "", 0), Delivered())
        print("written", flush=True)
    except Trouble as trouble:
        print(trouble, flush=True)
"""
    folder = tmp_path / "state"
    folder.mkdir()
    os.chown(folder, 65534, 65534)
    for parent in (folder, *folder.parents):
        if parent.is_relative_to(tempfile.gettempdir()) and parent != Path(tempfile.gettempdir()):
            parent.chmod(0o755)
    package = tmp_path / "package"
    package.mkdir()
    subprocess.run(["cp", "-r", os.path.dirname(module.__file__), str(package)], check=True)
    process = subprocess.Popen(
        ["/usr/bin/python3", "-c", script, str(folder), str(package)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin and process.stdout

    def write() -> str:
        process.stdin.write("\n")
        process.stdin.flush()
        return process.stdout.readline().strip()

    assert write() == "written"
    for path in folder.iterdir():
        os.chown(path, 0, 0)
    os.chown(folder, 0, 0)
    (folder / NAME).rename(folder / "aside")
    assert "cannot use the journal in" in write()
    (folder / "aside").rename(folder / NAME)
    for path in (folder, *folder.iterdir()):
        os.chown(path, 65534, 65534)
    assert write() == "written"
    process.stdin.close()
    process.wait(10)


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    journal = Journal(tmp_path)
    with journal.change() as database:
        database.execute("PRAGMA max_page_count = 12")
    with pytest.raises(Trouble, match="database or disk is full; look at its free space"):
        for number in range(2000):
            finish(journal, Delivered(), MAIL._replace(key=str(number).encode()))


def test_who_only_reads_makes_none(tmp_path):
    with pytest.raises(Trouble, match="there is no journal"):
        Journal(tmp_path, create=False).counts()
    assert list(tmp_path.iterdir()) == []


def test_what_another_process_removes_meanwhile_is_no_trouble(tmp_path, monkeypatch):
    """SQLite's own two files, when it closes the journal last."""
    finish(Journal(tmp_path), Delivered())
    looked_at = module.files.status_of

    def gone(path: Path) -> os.stat_result:
        if path.name != NAME:
            raise FileNotFoundError(2, "No such file or directory")
        return looked_at(path)

    monkeypatch.setattr(module.files, "status_of", gone)
    assert Journal(tmp_path, create=False).counts()


def test_a_later_version_is_left_alone(tmp_path):
    Journal(tmp_path).note("since")
    database = sqlite3.connect(tmp_path / NAME)
    database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(Trouble, match="written by a later version"):
        Journal(tmp_path).note("since")


def test_a_commit_outlives_a_kill(tmp_path):
    script = (
        "import os, sys; sys.path.insert(0, sys.argv[2]); from pathlib import Path\n"
        "from email_gateway.journal import *; from email_gateway.verdict import Delivered\n"
        "journal = Journal(Path(sys.argv[1]))\n"
        "with journal.change() as database:\n"
        "    journal.finish(database, Mail(b'key', 'operator', 'x', '', '', 0), Delivered())\n"
        "os.kill(os.getpid(), 9)"
    )
    package = os.path.dirname(os.path.dirname(module.__file__))
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path), package], check=False).returncode == -9
    assert isinstance(Journal(tmp_path).verdict(b"key"), Delivered)


def test_a_journal_of_the_first_version_is_taken_over(tmp_path):
    """What was under way then counts as consumed; what had not been handed over does not."""
    database = sqlite3.connect(tmp_path / NAME)
    database.executescript(f"{module._SCHEMA[0]} PRAGMA user_version = 1;")
    database.executemany(
        "INSERT INTO unit (opened, handed, consumed, doubt) VALUES (?, ?, ?, ?)",
        [(1.0, 2.0, 3.0, 0), (4.0, 5.0, None, 1), (6.0, None, None, 0)],
    )
    database.execute("INSERT INTO note VALUES ('feared', '7'), ('since', '8')")
    database.commit()
    database.close()
    with pytest.raises(Trouble, match="there is no journal"):
        Journal(tmp_path, create=False).counts()  # it is the service's to change
    journal = Journal(tmp_path)
    assert [(unit.opened, unit.consumed, unit.doubt) for unit in journal.units(0)] == [
        (1.0, 3.0, False),
        (4.0, 5.0, False),
    ]
    assert (journal.note("feared"), journal.note("since"), journal.flights()) == (None, 8, [])
    assert not journal.began_anew()


def test_the_journal_remembers_so_many_mails_at_most(tmp_path, monkeypatch):
    journal = Journal(tmp_path)
    with journal.change() as database:
        for number in range(60):
            mail = MAIL._replace(key=key_of(str(number)))
            verdict = Deferred("4.3.2", "x", "later") if number == 0 else Delivered()
            journal.finish(database, mail, verdict, copy=f"copy{number}" if number == 1 else None)
            journal.add_posted(database, mail.key, b"a", "", "general", time.time() - 3600 * (60 - number))
    monkeypatch.setattr(module, "_AT_ONCE", 20)
    journal.tidy(1)
    assert sum(journal.delivered([key_of(str(number)) for number in range(60)])) == 59  # may be brought again
    with journal.change() as database:
        database.execute("UPDATE mail SET changed = changed - 6 * 86400")
    left = []
    for _ in range(3):
        journal.tidy(30)
        left.append(sum(journal.delivered([key_of(str(number)) for number in range(60)])))
    assert left == [39, 30, 30]  # the copy, and 29 beside the one that waits
    assert journal.delivered([key_of(str(number)) for number in (1, 30, 31, 59)]) == [True, False, True, True]
    assert journal.posted() == {"general": 60}
    with journal.change() as database:
        assert database.execute("SELECT count(*) FROM posted").fetchone()[0] == 2


def test_a_mail_takes_little_of_the_disk(tmp_path):
    """What docs/variables.md says of email_gateway_history_max_mails."""
    journal = Journal(tmp_path)
    with journal.change() as database:
        for number in range(10_000):
            mail = MAIL._replace(key=key_of(str(number)), recipient=f"general.{'a' * 32}@mail.example.com")
            journal.finish(database, mail, Delivered("posted in Zulip", "posted"))
    journal.close()
    assert (tmp_path / NAME).stat().st_size < 10_000 * 400


def test_history_by_the_hour(tmp_path):
    journal = Journal(tmp_path)
    now = time.time()
    with journal.change() as database:
        journal.finish(database, MAIL, Delivered("posted in Zulip", "posted"))
        journal.add_posted(database, MAIL.key, b"a", "", "general", now)
        journal.add_posted(database, b"x", b"a", "", "general", now - 10 * 86400)
        database.execute("INSERT INTO delay VALUES (?, ?, 1, 100000)", (int(now // 3600), float("inf")))
    hour = int(now // 3600)
    found = journal.history(now - 7200)
    assert found["posted"] == [(hour, "general", 1)]
    assert found["outcomes"] == [(hour, "accepted", "postfix", 1), (hour, "delivered", "posted", 1)]
    assert [row[:3] for row in found["delays"]] == [(hour, 0.5, 1), (hour, None, 1)]
