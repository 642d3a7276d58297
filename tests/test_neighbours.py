"""What another user of the host has put in the place of a file: it is not opened, and nobody waits for it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from email_gateway import files, outcome, worker_log
from email_gateway.failures import Failures
from email_gateway.journal import Journal
from email_gateway.verdict import Deferred, Trouble
from email_gateway.worker_log import Follower
from mails import POSTED, line, mail, tell
from test_failures import write
from test_gateway import CHANNEL, keep
from test_outcome import FROM_POSTFIX


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def another_file(path: Path) -> None:
    secret = path.with_name("secret")
    secret.write_text(line(1.0, "Successfully processed email to general (zulip)"))
    path.symlink_to(secret)


def folder(path: Path) -> None:
    path.mkdir()


TRAPS = [pipe, device, another_file, folder]
Trap = Callable[[Path], None]


@pytest.mark.parametrize("trap", TRAPS)
def test_it_is_not_opened(tmp_path, trap):
    trap(tmp_path / "file")
    with pytest.raises(OSError):
        files.opened(tmp_path / "file")
    with pytest.raises(OSError):
        files.status_of(tmp_path / "file")


@pytest.mark.parametrize("trap", TRAPS)
@pytest.mark.parametrize("name", worker_log.NAMES)
def test_a_log_is_none(tmp_path, trap, name):
    trap(tmp_path / name)
    assert worker_log.find(tmp_path) is None and worker_log.consumed_since(tmp_path, 0) is None
    assert Follower(tmp_path).read() == []


@pytest.mark.parametrize("trap", TRAPS)
def test_a_log_that_is_replaced_is_read_no_more(tmp_path, trap):
    (tmp_path / "workers.log").touch()
    follower = Follower(tmp_path)
    follower.read()
    (tmp_path / "workers.log").rename(tmp_path / "workers.log.1")
    trap(tmp_path / "workers.log")
    assert follower.read() == []
    os.rename(tmp_path / "workers.log", tmp_path / "trap")
    tell(tmp_path, "Email has no nonempty body sections; ignoring.")
    assert [told.kind for told in follower.read()] == [worker_log.NO_TEXT]


def test_a_log_of_any_size_is_read_little_by_little(tmp_path):
    (tmp_path / "workers.log").touch()
    follower = Follower(tmp_path)
    follower.read()
    os.truncate(tmp_path / "workers.log", 2**40)
    before = os.times().user
    assert follower.read() == []
    assert os.times().user - before < 1 and follower.position and follower.position.offset < 2**24


def test_what_was_told_before_a_mail_is_not_taken_for_its_outcome(gateway):
    """However much that is."""
    assert gateway.deliver(FROM_POSTFIX, mail(b"m")) == POSTED
    with (gateway.config.logs / "workers.log").open("a") as file:
        file.write(("x" * 99 + "\n") * 100_000)
    tell(gateway.config.logs, "Email has no nonempty body sections; ignoring.")
    assert gateway.deliver(FROM_POSTFIX._replace(known_by=("postfix", "R", CHANNEL)), mail(b"m")) == POSTED


def test_a_log_that_grows_faster_than_it_is_read_only_delays(gateway, monkeypatch):
    monkeypatch.setattr(outcome, "_MOST_LOOKS", 5)
    assert gateway.deliver(FROM_POSTFIX, mail(b"m")) == POSTED
    os.truncate(gateway.config.logs / "workers.log", 2**40)
    verdict = gateway.deliver(FROM_POSTFIX._replace(known_by=("postfix", "R", CHANNEL)), mail(b"m"))
    assert isinstance(verdict, Deferred) and "is still being read" in verdict.reason and len(gateway.handed) == 1


def test_one_without_end_is_left_when_another_takes_its_place(tmp_path):
    (tmp_path / "workers.log").touch()
    follower = Follower(tmp_path)
    follower.read()
    os.truncate(tmp_path / "workers.log", 2**40)
    follower.read()
    (tmp_path / "workers.log").unlink()
    tell(tmp_path, "Email has no nonempty body sections; ignoring.")
    assert [told.kind for told in follower.read()] == [worker_log.NO_TEXT]


def test_more_lines_than_are_read_at_once(tmp_path):
    (tmp_path / "workers.log").touch()
    follower = Follower(tmp_path)
    follower.read()
    with (tmp_path / "workers.log").open("a") as file:
        file.write(("x" * 99 + "\n") * 100_000)
    tell(tmp_path, "Email has no nonempty body sections; ignoring.")
    (tmp_path / "workers.log").rename(tmp_path / "workers.log.1")
    tell(tmp_path, "Unable to find plaintext or HTML message body")
    told = [one.kind for _ in range(4) for one in follower.read()]
    assert told == [worker_log.NO_TEXT, worker_log.NO_BODY]


@pytest.mark.parametrize("trap", TRAPS)
def test_failed_mail_is_not_taken_from_it(gateway, trap):
    write(gateway, "")
    failures = Failures(gateway)
    failures.run()
    gateway.config.queue_errors.unlink()
    trap(gateway.config.queue_errors)
    with pytest.raises(Trouble, match=r"cannot read .*email_mirror.errors: Not a regular file"):
        failures.run()
    assert gateway.handed == []


def test_a_line_without_end_fills_no_disk(gateway):
    write(gateway, "")
    failures = Failures(gateway)
    failures.run()
    os.truncate(gateway.config.queue_errors, 2**40)
    with pytest.raises(Trouble, match="has a line of more than 67108864 bytes behind byte 0"):
        failures.run()
    assert sum(path.stat().st_blocks for path in gateway.config.state_dir.rglob("*")) * 512 < 2**20


@pytest.mark.parametrize("trap", TRAPS)
@pytest.mark.parametrize("suffix", ["", "-wal", "-shm"])
def test_the_journal_is_none(tmp_path, trap, suffix):
    journal = Journal(tmp_path)
    journal.counts()
    journal.close()
    path = tmp_path / f"journal.sqlite{suffix}"
    path.unlink(missing_ok=True)
    trap(path)
    with pytest.raises(Trouble, match=r"cannot use the journal in .*: Not a regular file"):
        Journal(tmp_path, create=False).counts()


@pytest.mark.parametrize("trap", TRAPS)
def test_a_copy_is_none(gateway, trap):
    copy = keep(gateway, b"refused")
    path = gateway.quarantine.path(copy.id)
    path.unlink()
    trap(path)
    with pytest.raises(Trouble, match=r"cannot read .*: (Not a regular file|Too many levels of symbolic links)"):
        list(gateway.quarantine.pieces(copy.id))
    gateway.journal.forget_copy(copy.id)
    gateway.quarantine.reindex()
    assert gateway.journal.copies() == []
