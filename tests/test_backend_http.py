"""Zulip's answers, served by a real HTTP server, become the right verdicts."""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from email_gateway import backend_http
from email_gateway.backend import prove
from email_gateway.backend_http import HttpBackend
from email_gateway.verdict import Deferred, Delivered, Refused, exit_status, pipe_line
from mails import mail, spool
from test_config import make_config

OK = json.dumps({"result": "success", "msg": ""})
SPOOL = Path("/nowhere")  # nothing is stored on the way to this back end
Answer = Callable[[BaseHTTPRequestHandler, bytes], None]


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    """Between two tries after a 500."""
    monkeypatch.setattr(backend_http, "_PAUSE", 0.01)


@pytest.fixture
def serve() -> Iterator[Callable[[Answer], str]]:
    servers = []

    def start(answer: Answer) -> str:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                answer(self, self.rfile.read(int(self.headers["Content-Length"])))

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def fixed(status: int, body: str, promise: int | None = None, keep: bool = False) -> Answer:
    def answer(handler: BaseHTTPRequestHandler, _: bytes) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body) if promise is None else promise))
        if not keep:
            handler.send_header("Connection", "close")
        handler.end_headers()
        handler.wfile.write(body.encode())

    return answer


def silent(handler: BaseHTTPRequestHandler, _: bytes) -> None:
    threading.Event().wait(10)
    handler.close_connection = True


def hang_up(handler: BaseHTTPRequestHandler, _: bytes) -> None:
    handler.close_connection = True


def trickle(handler: BaseHTTPRequestHandler, _: bytes) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "2000")
    handler.end_headers()
    for _ in range(1000):
        handler.wfile.write(b" ")
        threading.Event().wait(0.02)


def trickle_in_the_header(handler: BaseHTTPRequestHandler, _: bytes) -> None:
    with suppress(OSError):
        for _ in range(1000):
            handler.wfile.write(b"H")
            threading.Event().wait(0.02)


def error(message: str, **more: str) -> str:
    return json.dumps({"result": "error", "msg": message, **more})


BAD_ADDRESS = "5.1.1 Bad destination mailbox address: Bad stream token from email recipient x." + "a1" * 16 + "@y"

OTHER_PATTERN = "5.1.1 Bad destination mailbox address: Address not recognized by gateway."


@pytest.mark.parametrize(
    ("answer", "kind", "status", "words", "in_doubt"),
    [
        (fixed(200, OK), Delivered, "2.0.0", "accepted by Zulip", False),
        (fixed(400, error(BAD_ADDRESS)), Refused, "5.1.1", "Bad stream token from email recipient x.a1a1...@y", False),
        (fixed(400, error("Missing 'rcpt_to'", code="REQUEST_VARIABLE_MISSING")), Deferred, "4.3.5", "Missing", False),
        (fixed(400, error(OTHER_PATTERN)), Deferred, "4.3.5", "EMAIL_GATEWAY_PATTERN is not the gateway's", False),
        (fixed(400, error("55.1.1 no")), Deferred, "4.3.5", "faulty", False),
        (fixed(400, "<html>5.1.1 Bad</html>"), Deferred, "4.3.5", "HTTP 400", False),
        (fixed(400, json.dumps("5.1.1 x")), Deferred, "4.3.5", "HTTP 400", False),
        (fixed(403, error("Access denied")), Deferred, "4.7.8", "shared secret has changed", False),
        (fixed(404, "<html>"), Deferred, "4.3.5", "no mail endpoint", False),
        (fixed(405, "<html>"), Deferred, "4.3.5", "HTTP 405", False),
        (fixed(413, "<html>"), Deferred, "4.3.5", "HTTP 413", False),
        (fixed(302, ""), Deferred, "4.3.5", "HTTP 302", False),
        (fixed(500, "<html>"), Deferred, "4.3.2", "HTTP 500", False),
        (fixed(502, "<html>"), Deferred, "4.3.2", "supervisorctl status", False),
        (fixed(504, "<html>"), Deferred, "4.3.2", "HTTP 504", True),
        (fixed(200, "<html>Please log in</html>"), Deferred, "4.3.5", "does a proxy answer", False),
        (fixed(200, json.dumps({"result": "error", "msg": "5.1.1 x"})), Deferred, "4.3.5", "does a proxy", False),
        (fixed(200, ""), Deferred, "4.3.5", "does a proxy", False),
        (fixed(200, OK[:10], promise=len(OK)), Deferred, "4.4.2", "broke", True),
        (hang_up, Deferred, "4.4.2", "broke", True),
    ],
)
def test_answer(serve, answer, kind, status, words, in_doubt):
    verdict = HttpBackend(serve(answer), "secret", 20).hand_over("general@x", mail(b"hello"), SPOOL)
    check(verdict, kind, status, words, in_doubt)


@pytest.mark.parametrize(
    ("answer", "words"),
    [(silent, "did not answer within 0.2 s"), (trickle, "did not answer"), (trickle_in_the_header, "broke")],
)
def test_nobody_holds_a_mail_for_ever(serve, answer, words):
    started = time.monotonic()
    verdict = HttpBackend(serve(answer), "secret", 0.2).hand_over("general@x", mail(b"hello"), SPOOL)
    assert time.monotonic() - started < 5
    check(verdict, Deferred, "4.4.2", words, True)


def check(verdict, kind, status, words, in_doubt):
    """The verdict itself, and what Postfix is told of it."""
    assert isinstance(verdict, kind), verdict
    assert pipe_line(verdict).startswith(status) and words in pipe_line(verdict)
    assert exit_status(verdict) == {Delivered: 0, Deferred: 75, Refused: 69}[kind]
    assert getattr(verdict, "in_doubt", False) == in_doubt


def test_nothing_listens():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    verdict = HttpBackend(url, "secret", 20).hand_over("general@x", mail(b"hello"), SPOOL)
    assert isinstance(verdict, Deferred) and "nothing listens on 127.0.0.1:" in verdict.reason
    assert "systemctl status nginx" in verdict.reason and not verdict.in_doubt


def test_not_tls(serve):
    url = serve(fixed(200, OK)).replace("http:", "https:")
    verdict = HttpBackend(url, "secret", 20).hand_over("general@x", mail(b"hello"), SPOOL)
    assert isinstance(verdict, Deferred) and verdict.cause in ("TLS", "connection broken")


def test_the_endpoint_is_found_and_remembered(serve):
    asked = []

    def newer(handler: BaseHTTPRequestHandler, body: bytes) -> None:
        asked.append(handler.path)
        fixed(200 if handler.path == backend_http.PATHS[1] else 404, OK)(handler, body)

    one = HttpBackend(serve(newer), "secret", 20)
    assert isinstance(one.hand_over("general@x", mail(b"1"), SPOOL), Delivered)
    assert isinstance(one.hand_over("general@x", mail(b"2"), SPOOL), Delivered)
    assert asked == [backend_http.PATHS[0], backend_http.PATHS[1], backend_http.PATHS[1]]


def test_too_large_is_measured_on_the_form(serve):
    one = HttpBackend(serve(fixed(200, OK)), "secret", 20)
    plain = b"letters " * (19_660_000 // 8)
    assert isinstance(one.hand_over("general@x", mail(plain), SPOOL), Delivered)
    # As long, but its base64 is full of + and /, which the form has to escape.
    verdict = one.hand_over("general@x", mail(b"\xfb\xff\xbf" * (19_660_000 // 3)), SPOOL)
    assert isinstance(verdict, Refused) and verdict.status == "5.3.4" and str(backend_http.MAX_FORM) in verdict.reason


@pytest.mark.parametrize(
    ("answer", "good", "words"),
    [
        (fixed(400, error(BAD_ADDRESS)), True, "Zulip takes mail"),
        (fixed(400, error(OTHER_PATTERN)), False, "EMAIL_GATEWAY_PATTERN is not the gateway's"),
        (fixed(200, OK), False, "an address that no channel has"),
        (fixed(403, error("Access denied")), False, "shared secret"),
        (fixed(404, ""), False, "no mail endpoint"),
        (fixed(502, ""), False, "HTTP 502"),
    ],
)
def test_prove(serve, tmp_path, answer, good, words):
    verdict = prove(HttpBackend(serve(answer), "secret", 20), make_config(tmp_path), spool(tmp_path))
    assert isinstance(verdict, Delivered) == good and words in pipe_line(verdict)


def count_connections(serve, answer: Answer) -> tuple[HttpBackend, list[object]]:
    """A back end, and the client's address of each request that its server got."""
    seen: list[object] = []

    def counting(handler: BaseHTTPRequestHandler, body: bytes) -> None:
        seen.append(handler.client_address)
        answer(handler, body)

    return HttpBackend(serve(counting), "secret", 20), seen


keep_alive = fixed(200, OK, keep=True)


def test_the_connection_is_kept(serve):
    one, seen = count_connections(serve, keep_alive)
    for _ in range(3):
        assert isinstance(one.hand_over("general@x", mail(b"hello"), SPOOL), Delivered)
    assert len(seen) == 3 and len(set(seen)) == 1


def test_a_connection_that_was_closed_meanwhile_costs_nothing(serve):
    def closing(handler: BaseHTTPRequestHandler, body: bytes) -> None:
        keep_alive(handler, body)
        handler.close_connection = True  # it said nothing of it

    one, seen = count_connections(serve, closing)
    for _ in range(3):
        assert isinstance(one.hand_over("general@x", mail(b"hello"), SPOOL), Delivered)
        threading.Event().wait(0.05)
    assert len(seen) == len(set(seen)) == 3


def test_what_zulip_may_have_seen_is_not_asked_again(serve):
    """The connection was used before, and breaks after the whole request."""

    def second_hangs_up(handler: BaseHTTPRequestHandler, body: bytes) -> None:
        (keep_alive if len(seen) == 1 else hang_up)(handler, body)

    one, seen = count_connections(serve, second_hangs_up)
    assert isinstance(one.hand_over("general@x", mail(b"hello"), SPOOL), Delivered)
    verdict = one.hand_over("general@x", mail(b"hello"), SPOOL)
    assert isinstance(verdict, Deferred) and verdict.in_doubt and len(seen) == 2


def test_a_few_500s_are_not_worth_a_delay(serve):
    """Each of Zulip's processes says it once after PostgreSQL was restarted."""

    def recovering(handler: BaseHTTPRequestHandler, body: bytes) -> None:
        (fixed(500, "<html>") if len(seen) < 5 else keep_alive)(handler, body)

    one, seen = count_connections(serve, recovering)
    assert isinstance(one.hand_over("general@x", mail(b"hello"), SPOOL), Delivered)
    assert len(seen) == 5


def test_the_form_is_what_a_browser_would_send(serve):
    got: list[bytes] = []

    def keeping(handler: BaseHTTPRequestHandler, body: bytes) -> None:
        got.append(body)
        fixed(200, OK)(handler, body)

    one, content = HttpBackend(serve(keeping), "s+c/r=t", 1), bytes(range(256)) * 3000
    for text in (b"", b"x", content):
        one.hand_over("general.a+b@x", mail(text), SPOOL)
        form = dict(urllib.parse.parse_qsl(got[-1].decode(), strict_parsing=True, keep_blank_values=True))
        assert base64.b64decode(form.pop("msg_base64")) == text
        assert form == {"rcpt_to": "general.a+b@x", "secret": "s+c/r=t"}
