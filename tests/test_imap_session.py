"""What an IMAP server may answer that a real Dovecot does not; the rest is the scenario polling."""

from __future__ import annotations

import base64
import io
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
from email_gateway import imap_session
from email_gateway.config import Imap
from email_gateway.imap_session import Declined, ImapSession, Seen
from email_gateway.verdict import Trouble


def literal(uid: int, text: bytes) -> bytes:
    return b"* 1 FETCH (UID %d BODY[] {%d}\r\n%s)\r\n" % (uid, len(text), text)


ANSWERS = {
    b"CAPABILITY": b"* CAPABILITY IMAP4rev1 UIDPLUS\r\n",
    b"SELECT": b"* OK [UIDVALIDITY 7] x\r\n",
    b"UID FETCH 5": literal(5, b"mail five"),
    b"UID FETCH 6": literal(6, b"mail six"),
}


COMMANDS: list[bytes] = []


def serve(listening: socket.socket) -> None:
    connection = listening.accept()[0]
    with suppress(BrokenPipeError), connection, connection.makefile("rwb") as lines:
        lines.write(b"* OK hello\r\n")
        lines.flush()
        for line in lines:
            tag, _, command = line.partition(b" ")
            COMMANDS.append(command.strip())
            if command.startswith(b"UID FETCH 7"):
                continue  # no answer at all
            if command.startswith(b"AUTHENTICATE PLAIN"):
                lines.write(b"+ \r\n")
                lines.flush()
                COMMANDS.append(base64.b64decode(lines.readline()))
            untagged = b"".join(answer for name, answer in ANSWERS.items() if command.startswith(name))
            good = not command.startswith((b"UID FETCH 5", *DECLINED))
            lines.write(untagged + tag + (b" OK done\r\n" if good else b" NO [SERVERBUG] not today\r\n"))
            lines.flush()


DECLINED: tuple[bytes, ...] = ()


@contextmanager
def session(password: str = "x") -> Iterator[ImapSession]:
    COMMANDS.clear()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=serve, args=(listening,), daemon=True).start()
        port = listening.getsockname()[1]
        imap = Imap("127.0.0.1", port, "none", "INBOX", "zulip", "", "", 1000, {"password": password})
        made = ImapSession(imap, None, 0.5)
        try:
            yield made
        finally:
            made.close()


@pytest.fixture
def mailbox():
    with session() as made:
        yield made


def text(mailbox: ImapSession, uid: int) -> bytes | None:
    file = io.BytesIO()
    return None if mailbox.message(uid, file, 100, lambda: None) is None else file.getvalue()


def test_a_mail_half_answered_is_not_taken_for_the_next(mailbox):
    with pytest.raises(Declined, match="declines FETCH"):
        text(mailbox, 5)
    assert text(mailbox, 6) == b"mail six"


@pytest.mark.parametrize(
    "end", [literal(8, b""), b'* 1 FETCH (UID 8 BODY[]<8> "")\r\n', b"* 1 FETCH (UID 8 BODY[]<8> NIL)\r\n"]
)
def test_a_mail_comes_in_pieces(mailbox, monkeypatch, end):
    """Also one that has as many as whole pieces."""
    monkeypatch.setattr(imap_session, "_PIECE", 4)
    monkeypatch.setitem(ANSWERS, b"UID FETCH 8 (BODY.PEEK[]<0.", literal(8, b"mail"))
    monkeypatch.setitem(ANSWERS, b"UID FETCH 8 (BODY.PEEK[]<4.", literal(8, b"\0\r\n\xff"))
    monkeypatch.setitem(ANSWERS, b"UID FETCH 8 (BODY.PEEK[]<8.", end)
    assert text(mailbox, 8) == b"mail\0\r\n\xff"


def test_one_that_goes_meanwhile_is_gone(mailbox, monkeypatch):
    monkeypatch.setattr(imap_session, "_PIECE", 4)
    monkeypatch.setitem(ANSWERS, b"UID FETCH 8 (BODY.PEEK[]<0.", literal(8, b"mail"))
    assert text(mailbox, 8) is None


def test_a_silent_server_is_not_waited_for_for_ever(mailbox):
    with pytest.raises(Trouble, match=r"the session with .* broke: .*timed out"):
        text(mailbox, 7)


@pytest.mark.parametrize("found", [b"x", b"1 2 \xff", b"-1", b'"', b"9" * 5000])
def test_what_is_no_number_breaks_the_session_only(mailbox, monkeypatch, found):
    monkeypatch.setitem(ANSWERS, b"UID SEARCH", b"* SEARCH " + found + b"\r\n")
    with pytest.raises(Trouble, match=r"the session with .* broke: .* is no number"):
        mailbox.uids()


def test_nor_does_an_odd_uidvalidity_end_the_poller(monkeypatch):
    monkeypatch.setitem(ANSWERS, b"SELECT", b"* OK [UIDVALIDITY x] x\r\n")
    with pytest.raises(Trouble, match="b'x' is no number"), session():
        pass


def test_nor_do_capabilities_that_are_not_ascii(monkeypatch):
    monkeypatch.setitem(ANSWERS, b"CAPABILITY", b"* CAPABILITY IMAP4rev1 \xf4\r\n")
    with pytest.raises(Trouble, match=r"cannot connect to 127.0.0.1:[0-9]+: 'ascii' codec"), session():
        pass


def test_a_server_may_find_mail_in_several_lines(mailbox, monkeypatch):
    monkeypatch.setitem(ANSWERS, b"UID SEARCH", b"* SEARCH 3 1\r\n* SEARCH\r\n* SEARCH 2 3\r\n")
    assert mailbox.uids() == [1, 2, 3]


def test_the_last_mail_is_always_found_and_is_not_new(mailbox, monkeypatch):
    monkeypatch.setitem(ANSWERS, b"UID SEARCH UID 8:*", b"* SEARCH 7\r\n")
    assert mailbox.uids(7) == []


def test_more_mails_than_stand_in_one_answer(monkeypatch):
    """imaplib breaks the session at a line of 1,000,000 bytes."""
    numbers = [b" ".join(b"%d" % (10**9 + uid) for uid in range(first, first + 50_000)) for first in (0, 50_000)]
    monkeypatch.setitem(
        ANSWERS, b"SELECT", b"* 110000 EXISTS\r\n* OK [UIDVALIDITY 7] x\r\n* OK [UIDNEXT 1000200000] x\r\n"
    )
    monkeypatch.setitem(ANSWERS, b"UID SEARCH 1:50000 UID 1:* UNDELETED", b"* SEARCH " + numbers[0] + b"\r\n")
    monkeypatch.setitem(ANSWERS, b"UID SEARCH 50001:100000 UID 1:* UNDELETED", b"* SEARCH " + numbers[1] + b"\r\n")
    monkeypatch.setitem(ANSWERS, b"UID SEARCH 100001:* UID 1:* UNDELETED", b"* SEARCH 1000150000\r\n")
    monkeypatch.setitem(ANSWERS, b"UID SEARCH UID 1000150001:*", b"* SEARCH 1000150000\r\n")
    with session() as mailbox:
        assert len(mailbox.uids()) == 100_001 and mailbox.uids(1000150000) == []
        assert COMMANDS[-1] == b"UID SEARCH UID 1000150001:* UNDELETED"  # once all is looked at, one answer


def test_headers_of_many_mails_as_servers_may_write_them(mailbox, monkeypatch):
    monkeypatch.setitem(
        ANSWERS,
        b"UID FETCH 11,12,13,14,15",
        b"* 1 FETCH (UID 11 RFC822.SIZE 100 BODY[HEADER.FIELDS (TO)]<0> {9}\r\nTo: a\r\n\r\n)\r\n"
        b"* 2 FETCH (BODY[HEADER.FIELDS (TO)]<0> {9}\r\nTo: b\r\n\r\n UID 12 RFC822.SIZE 200)\r\n"
        b"* 4 FETCH (FLAGS (\\Seen))\r\n* 4 FETCH (UID 99 FLAGS (\\Seen))\r\n"
        b'* 3 FETCH (UID 13 RFC822.SIZE 300 BODY[HEADER.FIELDS (TO)]<0> "")\r\n'
        b"* 5 FETCH (UID 15 RFC822.SIZE 500 BODY[HEADER.FIELDS (TO)]<0> NIL)\r\n",
    )
    assert mailbox.headers([11, 12, 13, 14, 15]) == {
        **{11: Seen(100, b"To: a\r\n\r\n"), 12: Seen(200, b"To: b\r\n\r\n")},
        **{13: Seen(300, b""), 15: Seen(500, b"")},
    }


class Copied(set):
    was_copied = set.__contains__
    copied = set.add


@pytest.mark.parametrize(
    ("prefix", "folder"),
    [
        (b'(("" "/")) NIL NIL', b'"Zulip-Failed"'),
        (b'(("INBOX." ".")) NIL NIL', b'"INBOX.Zulip-Failed"'),
        (b'(("Mine/" "/")("Archive/" "/" "X-PARAM" ("F"))) (("Others/" "/")) NIL', b'"Mine/Zulip-Failed"'),
        (b'(("Archive/" "/")("" "/")) NIL NIL', b'"Zulip-Failed"'),
        (b'(("Archive/" "/")("Inbox/" "/")) NIL NIL', b'"Inbox/Zulip-Failed"'),
        (rb'(("My \"own\" &AOQ-/" "/")) NIL NIL', rb'"My \"own\" &AOQ-/Zulip-Failed"'),
        (b'(({6}\r\nINBOX/ "/")) NIL NIL', b'"INBOX/Zulip-Failed"'),
        (b"NIL NIL NIL", b'"Zulip-Failed"'),
    ],
)
def test_the_folder_for_what_cannot_be_posted_is_where_there_may_be_folders(monkeypatch, prefix, folder):
    """Spaces, quotes and the server's own way of writing other characters (RFC 3501, 5.1.3)."""
    monkeypatch.setitem(ANSWERS, b"CAPABILITY", b"* CAPABILITY IMAP4rev1 NAMESPACE MOVE\r\n")
    monkeypatch.setitem(ANSWERS, b"NAMESPACE", b"* NAMESPACE " + prefix + b"\r\n")
    with session() as mailbox:
        mailbox.set_aside(6, Copied())
        assert [b'LIST "" ' + folder, b"CREATE " + folder, b"UID MOVE 6 " + folder] == COMMANDS[-3:]


def test_without_move_a_mail_is_copied_once(mailbox, monkeypatch):
    """However often it cannot be removed."""
    monkeypatch.setattr(f"{__name__}.DECLINED", (b"UID STORE",))
    copied = Copied()
    for _ in range(3):
        with pytest.raises(Declined):
            mailbox.set_aside(6, copied)
    assert len([command for command in COMMANDS if command.startswith(b"UID COPY")]) == 1 and copied == {6}


def test_a_password_in_any_characters(monkeypatch):
    monkeypatch.setitem(ANSWERS, b"CAPABILITY", b"* CAPABILITY IMAP4rev1 AUTH=PLAIN LOGINDISABLED\r\n")
    with session("pässword"):
        assert "\0zulip\0pässword".encode() in COMMANDS and not [one for one in COMMANDS if one.startswith(b"LOGIN")]


@pytest.mark.parametrize(
    ("offered", "words"),
    [
        (b"LOGINDISABLED AUTH=XOAUTH2", "takes no password: it has disabled LOGIN and offers AUTH=XOAUTH2"),
        (b"LOGINDISABLED", "takes no password: it has disabled LOGIN and offers nothing"),
        (b"", "which LOGIN cannot send, and 127.0.0.1:[0-9]+ does not offer AUTH=PLAIN"),
    ],
)
def test_why_a_password_cannot_be_sent(monkeypatch, offered, words):
    monkeypatch.setitem(ANSWERS, b"CAPABILITY", b"* CAPABILITY IMAP4rev1 " + offered + b"\r\n")
    with pytest.raises(Trouble, match=words), session("pässword"):
        pass


def test_a_server_that_says_good_bye_while_it_is_waited_for(monkeypatch):
    monkeypatch.setitem(ANSWERS, b"CAPABILITY", b"* CAPABILITY IMAP4rev1 IDLE\r\n")
    monkeypatch.setitem(ANSWERS, b"IDLE", b"+ idling\r\n* BYE shutting down\r\n")
    with session() as mailbox, pytest.raises(Trouble, match=r"the session with .* broke"):
        mailbox.wait(0.2)
        mailbox.uids()


def test_a_server_that_never_ends_fills_no_disk(mailbox, monkeypatch):
    """Nor does one that knows no pieces and sends the whole mail each time."""
    monkeypatch.setattr(imap_session, "_PIECE", 4)
    monkeypatch.setitem(ANSWERS, b"UID FETCH 8 (BODY.PEEK[]<", literal(8, b"more"))
    file = io.BytesIO()
    assert mailbox.message(8, file, 10, lambda: None) == len(file.getvalue()) == 12
    monkeypatch.setitem(ANSWERS, b"UID FETCH 8 (BODY.PEEK[]<", literal(8, b"the whole mail"))
    assert text(mailbox, 8) == b"the whole mail"
