"""The answers of Zulip's SMTP server become the right verdicts."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
from email_gateway.backend import open_backend, prove
from email_gateway.backend_smtp import SmtpBackend, wire_format
from email_gateway.verdict import Deferred, Delivered, Refused, pipe_line
from test_backend_http import check
from test_config import make_config

GOOD = {
    "": "220 mail.example.com Zulip Server 11.0",
    "EHLO": "250-mail.example.com\r\n250-SIZE 33554432\r\n250 8BITMIME",
    "MAIL": "250 OK",
    "RCPT": "250 Continue",
    "DATA": "354 End data with <CR><LF>.<CR><LF>",
    ".": "250 OK",
    "QUIT": "221 Bye",
}


class Server:
    """One connection, answered line by line from a table; None hangs up, "..." says nothing."""

    def __init__(self, answers: dict[str, str | None]) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.socket.getsockname()[1]
        self.answers, self.got = answers, bytearray()
        threading.Thread(target=self.run, daemon=True).start()

    def run(self) -> None:
        connection = self.socket.accept()[0]
        with suppress(ConnectionError), connection, connection.makefile("rb") as lines:
            command = ""
            while (answer := self.answers.get(command)) is not None:
                if answer != "...":
                    connection.sendall(answer.encode() + b"\r\n")
                if command == "DATA" and answer.startswith("354"):
                    if self.answers.get("in DATA", "") is None:
                        return
                    while (line := lines.readline()) not in (b".\r\n", b""):
                        self.got += line
                    command = "."
                    continue
                if not (line := lines.readline()):
                    return
                command = line.split()[0].decode("latin-1").upper()


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(**answers: str | None) -> Server:
        servers.append(Server({**GOOD, **answers}))
        return servers[-1]

    yield start
    for server in servers:
        server.socket.close()


UNKNOWN = "550 5.1.1 Bad destination mailbox address: Bad stream token from email recipient general." + "a1" * 16


@pytest.mark.parametrize(
    ("answers", "kind", "status", "words", "in_doubt"),
    [
        ({}, Delivered, "2.0.0", "accepted by Zulip", False),
        ({"": "421 4.3.2 busy"}, Deferred, "4.3.2", "answers 421 4.3.2 busy", False),
        ({"": "554 no"}, Deferred, "4.3.2", "answers 554", False),
        ({"": None}, Deferred, "4.4.2", "broke", False),
        ({"": "..."}, Deferred, "4.4.2", "did not answer within 0.5 s", False),
        ({"EHLO": "500 Server error", "HELO": "500 Server error"}, Deferred, "4.3.2", "answers 500", False),
        ({"MAIL": "530 Must issue a STARTTLS command first"}, Deferred, "4.3.2", "answers 530", False),
        ({"RCPT": UNKNOWN}, Refused, "5.1.1", "recipient general.a1a1...", False),
        ({"RCPT": "550 5.7.1 Permission denied: archived"}, Refused, "5.7.1", "archived", False),
        (
            {"RCPT": "550 5.1.1 Bad destination mailbox address: Address not recognized by gateway."},
            *(Deferred, "4.3.5", "EMAIL_GATEWAY_PATTERN is not the gateway's", False),
        ),
        ({"RCPT": "550 4.7.0 Rate-limited due to too many emails"}, Deferred, "4.7.28", "rate limit", False),
        ({"RCPT": "500 Server error"}, Deferred, "4.3.2", "answers 500 Server error", False),
        ({"RCPT": "550 no"}, Deferred, "4.3.2", "answers 550 no", False),
        ({"RCPT": "421 4.7.6 TLS error"}, Deferred, "4.3.2", "answers 421", False),
        ({"RCPT": None}, Deferred, "4.4.2", "broke", False),
        ({"RCPT": "..."}, Deferred, "4.4.2", "did not answer", False),
        ({"DATA": "451 later"}, Deferred, "4.3.2", "answers 451", True),
        ({"DATA": None}, Deferred, "4.4.2", "broke", True),
        ({"in DATA": None}, Deferred, "4.4.2", "broke", True),
        ({".": "500 Server error"}, Deferred, "4.3.2", "answers 500", True),
        ({"RCPT": "550 5.7.1 Unable to relay"}, Deferred, "4.3.2", "answers 550 5.7.1 Unable to relay", False),
        ({"RCPT": "450 4.2.0 <general." + "a1" * 16 + "@x> greylisted"}, Deferred, "4.3.2", "general.a1a1...@x", False),
        ({".": "554 5.1.1 no verdict here"}, Deferred, "4.3.2", "answers 554", True),
        ({".": "552 Error: Too much mail data"}, Refused, "5.3.4", "too large", False),
        ({".": "552 5.2.2 The mailbox is full"}, Deferred, "4.3.2", "answers 552 5.2.2", True),
        ({".": None}, Deferred, "4.4.2", "broke", True),
        ({".": "..."}, Deferred, "4.4.2", "did not answer", True),
        ({"QUIT": None}, Delivered, "2.0.0", "accepted", False),
    ],
)
def test_answer(serve, answers, kind, status, words, in_doubt):
    verdict = SmtpBackend("127.0.0.1", serve(**answers).port, 0.5).hand_over("general@x", b"hello\n" * 100000)
    check(verdict, kind, status, words, in_doubt)


def test_nothing_listens():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    verdict = SmtpBackend("127.0.0.1", port, 1).hand_over("general@x", b"hello")
    assert isinstance(verdict, Deferred) and f"nothing listens on 127.0.0.1:{port}" in verdict.reason
    assert "systemctl status zulip-email-gateway-server" in verdict.reason


@pytest.mark.parametrize(
    ("answer", "cause", "words"),
    [("220 Ready", "TLS", "TLS with 127.0.0.1"), ("454 TLS not available", "SMTP 454", "answers 454 TLS not")],
)
def test_trouble_with_tls_across_a_network(serve, monkeypatch, answer, cause, words):
    monkeypatch.setattr("email_gateway.backend_smtp._is_loopback", lambda _: False)
    server = serve(EHLO="250-x\r\n250 STARTTLS", STARTTLS=f"{answer}\r\nno TLS at all")
    verdict = SmtpBackend("127.0.0.1", server.port, 1).hand_over("general@x", b"hello")
    assert isinstance(verdict, Deferred) and verdict.cause == cause and words in verdict.reason


def test_what_is_sent(serve):
    server = serve()
    message = b"Subject: s\n\n.dot\r\nlone\rcr\n\xff 8bit\n" + b"x" * 2500 + b"\n"
    assert SmtpBackend("127.0.0.1", server.port, 1).hand_over("general@x", message) == Delivered()
    assert server.got.startswith(b"Subject: s\r\n\r\n..dot\r\nlone\r\ncr\r\n\xff 8bit\r\n")
    lines = server.got.split(b"\r\n")
    assert max(map(len, lines)) == 998 and b"x" * 2500 in server.got.replace(b"\r\n ", b"")


def test_the_size_is_zulips_own(serve):
    server = serve(EHLO="250-x\r\n250 SIZE 1000")
    verdict = SmtpBackend("127.0.0.1", server.port, 1).hand_over("general@x", b"12345678\n" * 101)
    assert (
        isinstance(verdict, Refused) and verdict.status == "5.3.4" and "1010 bytes, and Zulip takes 1000" in verdict[2]
    )


def test_a_line_end_is_never_doubled():
    assert wire_format(b"a\r\nb\nc\rd") == b"a\r\nb\r\nc\r\nd"


@pytest.mark.parametrize(
    ("answer", "good", "words"),
    [(UNKNOWN, True, "Zulip takes mail"), ("250 OK", False, "no channel has"), ("500 Server error", False, "500")],
)
def test_prove(serve, tmp_path, answer, good, words):
    config = make_config(tmp_path, url=f"smtp://127.0.0.1:{serve(RCPT=answer).port}")
    verdict = prove(open_backend(config), config)
    assert isinstance(verdict, Delivered) == good and words in pipe_line(verdict)
