"""The milter protocol, as Postfix speaks it; what a real one makes of it is the scenario addresses' business."""

from __future__ import annotations

import socket
import struct
import threading
from contextlib import suppress
from typing import Any

import pytest
from email_gateway import milter
from email_gateway.message import Message

OFFER = struct.pack(">III", 6, 0x1FF, 0x1FFFFF)


def packet(command: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", 1 + len(data)) + command + data


def mail(sender: bytes = b"<a@example.org>", *recipients: bytes, header: Any = (), body: Any = ()) -> bytes:
    text = packet(b"D", b"Mi\0QID\0") + packet(b"M", sender + b"\0SIZE=1\0")
    text += b"".join(packet(b"R", recipient + b"\0") for recipient in recipients or (b"<x@example.com>",))
    text += b"".join(packet(b"L", name + b"\0" + value + b"\0") for name, value in header)
    return text + b"".join(packet(b"B", piece) for piece in body) + packet(b"E")


class Smtpd:
    """The other end of a conversation; .seen: what was asked for a decision."""

    def __init__(self, reply: str = "", wants_body: bool = False) -> None:
        self.seen: list[tuple[str, list[str], bytes]] = []
        self.dashes: list[int] = []
        self.error: Exception | None = None
        self.end, ours = socket.socketpair()
        self.end.settimeout(5)

        def decide(sender: str, recipients: list[str], header: Message, dashes: int) -> str:
            self.seen.append((sender, list(recipients), header.header()))
            self.dashes.append(dashes)
            return reply

        def run() -> None:
            with ours:
                try:
                    milter.converse(ours, decide, wants_body)
                except OSError as error:
                    self.error = error

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()

    def asks(self, text: bytes) -> tuple[bytes, bytes]:
        self.end.sendall(text)
        return self.answer()

    def answer(self) -> tuple[bytes, bytes]:
        length = struct.unpack(">I", self.end.recv(4, socket.MSG_WAITALL))[0]
        answer = self.end.recv(length, socket.MSG_WAITALL)
        return answer[:1], answer[1:]

    def leaves(self) -> None:
        self.end.close()
        self.thread.join(5)
        assert not self.thread.is_alive()


def test_a_session_of_two_mails():
    smtpd = Smtpd()
    command, agreed = smtpd.asks(packet(b"O", OFFER))
    version, actions, protocol = struct.unpack(">III", agreed)
    assert (command, version, actions) == (b"O", 6, 0)
    assert protocol & 0x10, "the body is not wanted"
    assert smtpd.asks(mail(b"<a@b>", b"<x@y>", b"z@y", header=((b"From", b"a@b\n c"), (b"To", b"x")))) == (b"c", b"")
    smtpd.end.sendall(packet(b"M", b"<lost@b>\0") + packet(b"A"))
    assert smtpd.asks(mail(b"<>")) == (b"c", b"")
    assert smtpd.seen == [("a@b", ["x@y", "z@y"], b"From: a@b\n c\nTo: x"), ("", ["x@example.com"], b"\n")]
    smtpd.end.sendall(packet(b"Q"))
    smtpd.leaves()
    assert smtpd.error is None


def test_a_rejection_in_the_words_of_smtp():
    smtpd = Smtpd("550 5.7.1 not 100% yours: ä")
    smtpd.asks(packet(b"O", OFFER))
    assert smtpd.asks(mail()) == (b"y", b"550 5.7.1 not 100%% yours: ?\0")
    smtpd.leaves()


def test_the_body_is_counted_where_that_is_wanted():
    smtpd = Smtpd(wants_body=True)
    _, agreed = smtpd.asks(packet(b"O", OFFER))
    assert not struct.unpack(">III", agreed)[2] & 0x10
    smtpd.asks(mail(body=[b"--a\r\n--b\r\n-", b"-c\r\n", b"--d\r", b"\n", b"-", b"-e --\r\n"]))
    smtpd.asks(mail())
    assert smtpd.dashes == [4, 0]
    smtpd.leaves()


def test_of_a_header_without_end_the_beginning_is_looked_at():
    smtpd = Smtpd()
    smtpd.asks(packet(b"O", OFFER))
    fields = ((b"From", b"a@b"), *((b"X", b"x" * 100_000) for _ in range(100)))
    assert smtpd.asks(mail(header=fields)) == (b"c", b"")
    assert smtpd.seen[0][2].startswith(b"From: a@b\n") and len(smtpd.seen[0][2]) < 400_000
    smtpd.leaves()


def test_a_header_of_very_many_fields_is_not_read_to_its_end():
    smtpd = Smtpd()
    smtpd.asks(packet(b"O", OFFER))
    smtpd.end.sendall(mail(header=[(b"A", b"")] * 10_000))
    assert smtpd.answer() == (b"c", b"")
    with suppress(OSError):
        smtpd.end.sendall(mail(header=[(b"A", b"")] * 100_000))
    smtpd.thread.join(5)
    assert smtpd.error is not None and len(smtpd.seen) == 1
    smtpd.leaves()


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\0\0",
        b"\0\0\0\5Oxx",
        b"\0\0\0\0",
        b"\xff\xff\xff\xff",
        packet(b"O", b"short"),
        packet(b"O", struct.pack(">III", 2, 0, 0x7F)),
        b"request=smtpd_access_policy\n\n",
    ],
)
def test_nonsense_ends_it(text):
    smtpd = Smtpd()
    smtpd.end.sendall(text)
    smtpd.end.shutdown(socket.SHUT_WR)
    smtpd.leaves()
    assert smtpd.seen == []
