"""What the poller remembers over a restart."""

from __future__ import annotations

import os
import time

import pytest
from email_gateway.inbox_notes import Notes
from email_gateway.verdict import Trouble


def test_all_of_it_is_there_after_a_restart(tmp_path):
    notes = Notes(tmp_path, "mine")
    notes.pass_over(7)
    since = notes.since(9)
    notes.copied(10)
    again = Notes(tmp_path, "mine")
    assert (again.passed, again.since(9), again.was_copied(10), again.was_copied(9)) == (7, since, True, False)


def test_what_has_left_the_inbox_is_forgotten(tmp_path):
    notes = Notes(tmp_path, "mine")
    before = notes.since(9) - 1
    notes.copied(10)
    notes.keep_only({8})
    again = Notes(tmp_path, "mine")
    assert again.since(9) > before and not again.was_copied(10)


def test_another_inbox_or_other_addresses_begin_anew(tmp_path):
    Notes(tmp_path, "mine").pass_over(7)
    assert Notes(tmp_path, "another").passed == 0


def test_a_mail_over_which_the_process_has_ended_twice(tmp_path):
    """First with others: then each is read alone."""

    def ends(uids):
        if os.fork() == 0:
            with Notes(tmp_path, "mine").reading(uids):
                os._exit(1)
        os.wait()

    ends([1, 2, 3])
    notes = Notes(tmp_path, "mine")
    assert notes.suspects == {1, 2, 3} and notes.too_bad == set()
    with notes.reading([1]):
        pass
    ends([2])
    notes = Notes(tmp_path, "mine")
    assert notes.suspects == {2, 3} and notes.too_bad == {2}
    notes.keep_only({3})  # it was moved away
    assert Notes(tmp_path, "mine").suspects == {3}


def test_a_fault_of_ours_is_not_the_end_of_the_process(tmp_path):
    notes = Notes(tmp_path, "mine")
    with pytest.raises(ZeroDivisionError), notes.reading([1]):
        raise ZeroDivisionError
    assert Notes(tmp_path, "mine").suspects == set()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"inbox": "mine"', b"\xff", b"null"])
def test_what_is_damaged_is_as_if_it_were_not_there(tmp_path, content):
    for name in ("inbox.json", "inbox-reading.json"):
        (tmp_path / name).write_bytes(content)
    notes = Notes(tmp_path, "mine")
    assert notes.passed == 0 and notes.since(1) <= time.time()


def test_what_cannot_be_written_is_said(tmp_path):
    (tmp_path / "inbox.json.new").mkdir()
    with pytest.raises(Trouble, match=r"cannot write .*inbox\.json: Is a directory"):
        Notes(tmp_path, "mine").since(1)
