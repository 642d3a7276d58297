"""The answers of Zulip's SMTP server become the right verdicts."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import zulip_info
from email_gateway import backend_smtp
from email_gateway.backend import open_backend, prove
from email_gateway.backend_smtp import SmtpBackend
from email_gateway.verdict import Deferred, Delivered, Refused, Verdict, pipe_line
from mails import mail, spool
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


def hand_over(server: Server, folder: Path, content: bytes = b"hello", seconds: float = 20) -> Verdict:
    return SmtpBackend("127.0.0.1", server.port, seconds).hand_over("general@x", mail(content), folder)


UNKNOWN = "550 5.1.1 Bad destination mailbox address: Bad stream token from email recipient general." + "a1" * 16


@pytest.mark.parametrize(
    ("answers", "kind", "status", "words", "in_doubt"),
    [
        ({}, Delivered, "2.0.0", "accepted by Zulip", False),
        ({"": "421 4.3.2 busy"}, Deferred, "4.3.2", "answers 421 4.3.2 busy", False),
        ({"": "554 no"}, Deferred, "4.3.2", "answers 554", False),
        ({"": None}, Deferred, "4.4.2", "broke", False),
        ({"": "..."}, Deferred, "4.4.2", "did not answer within 0.3 s", False),
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
        ({"DATA": "451 later"}, Deferred, "4.3.2", "answers 451", False),
        ({"DATA": None}, Deferred, "4.4.2", "broke", True),
        ({"in DATA": None}, Deferred, "4.4.2", "broke", True),
        ({".": "500 Server error"}, Deferred, "4.3.2", "answers 500", False),
        ({"RCPT": "550 5.7.1 Unable to relay"}, Deferred, "4.3.2", "answers 550 5.7.1 Unable to relay", False),
        ({"RCPT": "450 4.2.0 <general." + "a1" * 16 + "@x> greylisted"}, Deferred, "4.3.2", "general.a1a1...@x", False),
        ({".": "554 5.1.1 no verdict here"}, Deferred, "4.3.2", "answers 554", False),
        ({".": "552 Error: Too much mail data"}, Refused, "5.3.4", "too large", False),
        ({".": "552 5.2.2 The mailbox is full"}, Deferred, "4.3.2", "answers 552 5.2.2", False),
        ({".": None}, Deferred, "4.4.2", "broke", True),
        ({".": "..."}, Deferred, "4.4.2", "did not answer", True),
        ({"EHLO": "250-x\r\n250 SIZE abc"}, Delivered, "2.0.0", "accepted", False),
    ],
)
def test_answer(serve, tmp_path, answers, kind, status, words, in_doubt):
    seconds = 0.3 if "..." in answers.values() else 20
    verdict = hand_over(serve(**answers), tmp_path, b"hello\n" * 100000, seconds)
    check(verdict, kind, status, words, in_doubt)


def test_nothing_listens(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    verdict = SmtpBackend("127.0.0.1", port, 1).hand_over("general@x", mail(b"hello"), tmp_path)
    assert isinstance(verdict, Deferred) and f"nothing listens on 127.0.0.1:{port}; look at" in verdict.reason


@pytest.mark.parametrize(
    ("answer", "cause", "words"),
    [("220 Ready", "TLS", "TLS with 127.0.0.1"), ("454 TLS not available", "SMTP 454", "answers 454 TLS not")],
)
def test_trouble_with_tls_across_a_network(serve, tmp_path, monkeypatch, answer, cause, words):
    monkeypatch.setattr("email_gateway.backend_smtp._is_loopback", lambda _: False)
    server = serve(EHLO="250-x\r\n250 STARTTLS", STARTTLS=f"{answer}\r\nno TLS at all")
    verdict = hand_over(server, tmp_path)
    assert isinstance(verdict, Deferred) and verdict.cause == cause and words in verdict.reason


def test_what_is_sent(serve, tmp_path):
    server = serve()
    message = b"Subject: s\n\n.dot\r\nlone\rcr\n\xff 8bit\n"
    assert hand_over(server, tmp_path, message) == Delivered()
    assert server.got == b"Subject: s\r\n\r\n..dot\r\nlone\r\ncr\r\n\xff 8bit\r\n"


def test_the_size_is_zulips_own(serve, tmp_path, monkeypatch):
    monkeypatch.setattr("email_gateway.backend_smtp._ZULIPS_LIMIT", 1000)
    verdict = hand_over(serve(EHLO="250-x\r\n250 SIZE 1000"), tmp_path, b"12345678\n" * 101)
    assert (
        isinstance(verdict, Refused) and verdict.status == "5.3.4" and "1010 bytes, and Zulip takes 1000" in verdict[2]
    )


def test_the_session_is_kept_also_after_a_verdict_on_an_address(serve, tmp_path):
    server = serve(RSET="250 OK")
    one = SmtpBackend("127.0.0.1", server.port, 20)
    for answer, kind in (("250 OK", Delivered), (UNKNOWN, Refused), ("250 OK", Delivered)):
        server.answers["RCPT"] = answer
        assert isinstance(one.hand_over("general@x", mail(b"hello"), tmp_path), kind)
    assert server.got == b"hello\r\n" * 2  # and this server takes one connection only


def test_a_session_that_was_closed_meanwhile_costs_nothing(serve, tmp_path):
    server = serve(MAIL="250 OK")
    one = SmtpBackend("127.0.0.1", server.port, 20)
    assert one.hand_over("general@x", mail(b"hello"), tmp_path) == Delivered()
    server.answers["MAIL"] = None
    threading.Thread(target=lambda: (server.answers.update(MAIL="250 OK"), server.run()), daemon=True).start()
    assert one.hand_over("general@x", mail(b"hello"), tmp_path) == Delivered()


@pytest.mark.parametrize("command", ["EHLO", "RCPT", "."])
def test_answers_that_trickle_cannot_hold_a_mail_for_ever(tmp_path, command):
    """Each byte comes in time, and all steps together are bounded."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=trickle, args=(listening, command), daemon=True).start()
        one = SmtpBackend("127.0.0.1", listening.getsockname()[1], 0.3)
        started = time.monotonic()
        verdict = one.hand_over("general@x", mail(b"hello"), tmp_path)
        assert isinstance(verdict, Deferred) and "did not answer" in verdict.reason
        assert time.monotonic() - started < 5


def trickle(listening: socket.socket, slow: str) -> None:
    connection = listening.accept()[0]
    with suppress(OSError), connection, connection.makefile("rb") as lines:
        connection.sendall(GOOD[""].encode() + b"\r\n")
        command = ""
        while command != slow:
            command = lines.readline().split()[0].decode().upper()
            if command != slow:
                connection.sendall(GOOD[command].encode() + b"\r\n")
            if command == "DATA":
                while lines.readline() != b".\r\n":
                    pass
                command = "."
        for _ in range(100):
            connection.sendall(b"2")
            time.sleep(0.1)


def test_nobody_waits_for_a_goodbye(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(backend_smtp, "_GOODBYE", 20.0)
    started = time.monotonic()
    hand_over(serve(QUIT="...", DATA="451 later"), tmp_path)
    hand_over(serve(QUIT="...", RCPT="451 later", RSET="..."), tmp_path, seconds=0.3)
    assert time.monotonic() - started < 10


def test_another_servers_size_is_no_verdict(serve, tmp_path):
    verdict = hand_over(serve(EHLO="250-x\r\n250 SIZE 1000"), tmp_path, b"12345678\n" * 101)
    assert isinstance(verdict, Deferred) and "is it Zulip's mail server?" in verdict.reason


@pytest.mark.parametrize(
    ("answer", "good", "words"),
    [(UNKNOWN, True, "Zulip takes mail"), ("250 OK", False, "no channel has"), ("500 Server error", False, "500")],
)
def test_prove(serve, tmp_path, answer, good, words):
    config = make_config(tmp_path, url=f"smtp://127.0.0.1:{serve(RCPT=answer).port}")
    verdict = prove(open_backend(config), config, spool(tmp_path))
    assert isinstance(verdict, Delivered) == good and words in pipe_line(verdict)


@pytest.mark.parametrize(
    ("answer", "kind"), [("250 Continue", Delivered), (UNKNOWN, Refused), ("500 Server error", Deferred)]
)
def test_an_address_is_asked_for_without_a_mail(serve, tmp_path, answer, kind):
    server = serve(RCPT=answer, DATA="554 no mail is to come", RSET="250 OK")
    verdict = SmtpBackend("127.0.0.1", server.port, 20).knows("general@x", spool(tmp_path))
    assert isinstance(verdict, kind) and not server.got


def test_what_zulip_can_never_write_out_again_is_repaired_or_refused(serve, tmp_path):
    """It would answer 500 at every try, each of which takes room in its rate limit."""
    broken = b"Subject: a\x0cb\r\nTo: x\r\n\r\nhello\r\n"
    server = serve()
    assert hand_over(server, tmp_path, broken) == Delivered()
    assert server.got == b"Subject: a b\r\nTo: x\r\n\r\nhello\r\n"
    deep = b"".join(b"Content-Type: multipart/mixed; boundary=b%d\r\n\r\n--b%d\r\n" % (n, n) for n in range(300))
    verdict = hand_over(serve(), tmp_path, deep + b"\r\nx\r\n")
    assert isinstance(verdict, Refused) and "nested too deeply for Zulip" in verdict.reason


@pytest.mark.parametrize(
    ("host", "port", "words"),
    [
        ("127.0.0.1", backend_smtp.OUR_PORT, "look at: systemctl status zulip-email-gateway-server"),
        (
            "127.0.0.1",
            1,
            "look at Zulip's container (does it run, and is its port 25 published there?) or Zulip's",
        ),
        ("192.0.2.1", 25, "look at Zulip's host: supervisorctl status"),
    ],
)
def test_the_hint_fits_where_zulip_runs(host, port, words):
    """On this host by our own unit, in a container with a published port, or elsewhere."""
    backend = SmtpBackend(host, port, 1)
    assert words in backend._look_at
    backend._other(500, b"Server error")
    # Only what is ours can be restarted (revival.py).
    assert backend.said_500 == (port == backend_smtp.OUR_PORT)


def test_our_port_is_the_one_that_is_installed():
    assert f"smtp://127.0.0.1:{backend_smtp.OUR_PORT}" == zulip_info.MAIL_SERVER_URL
