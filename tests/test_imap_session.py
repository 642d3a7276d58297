"""What an IMAP server may answer that a real Dovecot does not; the rest is the scenario polling."""

from __future__ import annotations

import io
import socket
import threading

import imap_tools
import pytest
from email_gateway import imap_session
from email_gateway.config import Imap
from email_gateway.imap_session import Declined, ImapSession
from email_gateway.verdict import Trouble


def literal(uid: int, text: bytes) -> bytes:
    return b"* 1 FETCH (UID %d BODY[] {%d}\r\n%s)\r\n" % (uid, len(text), text)


ANSWERS = {
    b"CAPABILITY": b"* CAPABILITY IMAP4rev1 UIDPLUS\r\n",
    b"SELECT": b"* OK [UIDVALIDITY 7] x\r\n",
    b"UID FETCH 5": literal(5, b"mail five"),
    b"UID FETCH 6": literal(6, b"mail six"),
}


def serve(listening: socket.socket) -> None:
    connection = listening.accept()[0]
    with connection, connection.makefile("rwb") as lines:
        lines.write(b"* OK hello\r\n")
        lines.flush()
        for line in lines:
            tag, _, command = line.partition(b" ")
            if command.startswith(b"UID FETCH 7"):
                continue  # no answer at all
            untagged = b"".join(answer for name, answer in ANSWERS.items() if command.startswith(name))
            good = not command.startswith(b"UID FETCH 5")
            lines.write(untagged + tag + (b" OK done\r\n" if good else b" NO [SERVERBUG] not today\r\n"))
            lines.flush()


@pytest.fixture
def mailbox(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=serve, args=(listening,), daemon=True).start()
        port = listening.getsockname()[1]
        monkeypatch.setattr(
            ImapSession, "_connect", lambda *_: imap_tools.MailBoxUnencrypted("127.0.0.1", port, timeout=0.5)
        )
        made = ImapSession(Imap("127.0.0.1", port, "implicit", "INBOX", "zulip", "", "", {"password": "x"}), None, 5)
        yield made
        made.close()


def text(mailbox: ImapSession, uid: int) -> bytes | None:
    file = io.BytesIO()
    return None if mailbox.message(uid, file) is None else file.getvalue()


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
    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=serve, args=(listening,), daemon=True).start()
        port = listening.getsockname()[1]
        monkeypatch.setattr(
            ImapSession, "_connect", lambda *_: imap_tools.MailBoxUnencrypted("127.0.0.1", port, timeout=0.5)
        )
        with pytest.raises(Trouble, match="b'x' is no number"):
            ImapSession(Imap("127.0.0.1", port, "implicit", "INBOX", "zulip", "", "", {"password": "x"}), None, 5)


def test_nor_do_capabilities_that_are_not_ascii(monkeypatch):
    monkeypatch.setitem(ANSWERS, b"CAPABILITY", b"* CAPABILITY IMAP4rev1 \xf4\r\n")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=serve, args=(listening,), daemon=True).start()
        port = listening.getsockname()[1]
        with pytest.raises(Trouble, match=f"cannot connect to 127.0.0.1:{port}: 'ascii' codec"):
            ImapSession(Imap("127.0.0.1", port, "starttls", "INBOX", "zulip", "", "", {"password": "x"}), None, 5)
