"""The hand-over to Zulip 10 and earlier: the internal HTTP endpoint.

``POST`` with the form fields rcpt_to, msg_base64 and secret. Only a JSON answer
400 whose msg starts with ``5.`` is a verdict on the mail; everything else, a
proxy's error page with status 200 included, is trouble that may pass.
"""

from __future__ import annotations

import base64
import http.client
import json
import re
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from .addresses import redact
from .backend import MAX_IDLE, Pool
from .deadline import Deadline
from .message import Message, stored
from .verdict import NO_ANSWER, Deferred, Delivered, Refused, Verdict, on_address

# The endpoint moved with Zulip 9: try, and remember.
PATHS = ("/email_mirror_message", "/api/internal/email_mirror_message")
# Django's DATA_UPLOAD_MAX_MEMORY_SIZE as Zulip sets it (bytes of the whole form).
MAX_FORM = 25 * 2**20
# An answer is a line of JSON; a page is cut off here (bytes).
_MAX_ANSWER = 64 * 2**10
_CONNECT_TIMEOUT = 10.0
# A connection that outlives the deadline by this (seconds) is cut.
_GRACE = 0.5
# After a restart of PostgreSQL each of Zulip's processes answers one request with 500
# (measured, four processes): ask so often, with a pause (seconds) in between.
_TRIES, _PAUSE = 5, 1.0


class HttpBackend:
    """Hands mails to Zulip at `url`.

    secret: Zulip's shared secret. timeout: seconds for each read and write; twice
    that bounds the whole hand-over. endpoint: the path that served last time, or None.
    """

    def __init__(self, url: str, secret: str, timeout: float, endpoint: str | None = None) -> None:
        self._url = urllib.parse.urlsplit(url)
        self._where = f"{self._url.hostname}:{self._url.port or (80 if self._url.scheme == 'http' else 443)}"
        self._secret = secret
        self.said_500 = False
        self._timeout = timeout
        self.endpoint: str | None = endpoint if endpoint in PATHS else PATHS[0]
        self._pool: Pool[http.client.HTTPConnection] = Pool(
            lambda connection: connection.sock, lambda connection: connection.close()
        )

    def close_idle(self, seconds: float = MAX_IDLE) -> None:
        """Close the connections that were not used for so long (seconds)."""
        self._pool.close_idle(seconds)

    def hand_over(self, recipient: str, message: Message, spool: Path) -> Verdict:
        """Hand one mail over; never raises for trouble of the back end."""
        form = Form(recipient, message, self._secret)
        if form.size > MAX_FORM:
            return Refused(
                "5.3.4",
                "too large",
                f"the message is too large for Zulip: {message.size} bytes, which make {form.size} bytes "
                f"in the form that Zulip limits to {MAX_FORM}; about {MAX_FORM * 3 // 4} bytes of plain text fit",
            )
        deadline = Deadline(2 * self._timeout)
        verdict = self._ask(form, deadline)
        for _ in range(_TRIES - 1):
            if not isinstance(verdict, Deferred) or verdict.cause != "HTTP 500":
                break
            time.sleep(_PAUSE)
            verdict = self._ask(form, deadline)
        return verdict

    def knows(self, recipient: str, spool: Path) -> Verdict:
        """See Backend. An empty mail: Zulip looks at its address, and its worker makes nothing of it."""
        with stored(spool) as nothing:
            return self.hand_over(recipient, Message(nothing), spool)

    def _ask(self, form: Form, deadline: Deadline) -> Verdict:
        for path in sorted(PATHS, key=lambda path: path != self.endpoint):
            verdict = self._post(path, form, deadline)
            if verdict is not None:
                self.endpoint = path
                return verdict
        return Deferred(
            "4.3.5",
            "no endpoint",
            f"there is no mail endpoint at {self._url.geturl()} (404 for {' and '.join(PATHS)}): "
            "was Zulip upgraded to 11, or is the URL wrong? Run playbooks/site.yml",
        )

    def _post(self, path: str, form: Form, deadline: Deadline) -> Verdict | None:
        """One request; None for 404."""
        used = self._pool.take()
        if used is not None:
            verdict, is_answered = self._exchange(used, path, form, deadline)
            if is_answered or not isinstance(verdict, Deferred) or verdict.in_doubt:
                return verdict
        # Either there was none, or it broke before Zulip can have seen the whole request.
        return self._exchange(self._connection(), path, form, deadline)[0]

    def _exchange(
        self, connection: http.client.HTTPConnection, path: str, form: Form, deadline: Deadline
    ) -> tuple[Verdict | None, bool]:
        """One request on this connection, and whether it was answered."""
        sent = False
        try:
            if connection.sock is None:
                connection.connect()
            assert connection.sock is not None
            connection.putrequest("POST", path, skip_accept_encoding=True)
            connection.putheader("Content-Type", "application/x-www-form-urlencoded")
            connection.putheader("Content-Length", str(form.size))
            connection.endheaders()
            for piece in form.pieces():
                connection.sock.settimeout(deadline.left(self._timeout))
                connection.send(piece)
            sent = True  # what was not complete Zulip does not take for a request
            connection.sock.settimeout(deadline.left(self._timeout))
            # The steps are bounded one by one; this bounds a header that trickles.
            end = threading.Timer(deadline.left() + _GRACE, _cut, [connection.sock])
            end.start()
            try:
                response = connection.getresponse()
                answer = _read(connection, response, deadline, self._timeout)
            finally:
                end.cancel()
        except ConnectionRefusedError:
            return self._broken(
                connection,
                "4.4.1",
                "connection refused",
                f"nothing listens on {self._where}; look at: systemctl status nginx",
            )
        except TimeoutError:
            what = f"Zulip at {self._where} did not answer within {self._timeout:g} s"
            return self._broken(
                connection, "4.4.2", NO_ANSWER, f"{what}; look at: supervisorctl status zulip-django", sent
            )
        except ssl.SSLError as error:
            what = f"TLS with {self._where} failed: {error.reason}; is the URL right?"
            return self._broken(connection, "4.7.5", "TLS", what, sent)
        except (OSError, http.client.HTTPException) as error:
            what = f"the connection to {self._where} broke: {type(error).__name__}: {error}"
            return self._broken(connection, "4.4.2", "connection broken", what, sent)
        except BaseException:
            connection.close()
            raise
        is_read = response.length == 0 or response.isclosed()
        response.close()
        if is_read and not response.will_close:
            self._pool.give(connection)
        else:
            connection.close()
        return (None if response.status == 404 else interpret(response.status, answer)), True

    @staticmethod
    def _broken(
        connection: http.client.HTTPConnection, status: str, cause: str, reason: str, in_doubt: bool = False
    ) -> tuple[Verdict, bool]:
        connection.close()
        return Deferred(status, cause, reason, in_doubt), False

    def _connection(self) -> http.client.HTTPConnection:
        host, port = self._url.hostname or "127.0.0.1", self._url.port
        timeout = min(_CONNECT_TIMEOUT, self._timeout)
        if self._url.scheme == "http":
            return http.client.HTTPConnection(host, port, timeout=timeout)
        # Zulip's certificate is for its public name, and often self-signed; what
        # is asked is the host's own loopback address.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return http.client.HTTPSConnection(host, port, timeout=timeout, context=context)


class Form:
    """A request's body (application/x-www-form-urlencoded), which is never whole in memory."""

    def __init__(self, recipient: str, message: Message, secret: str) -> None:
        self._message = message
        self._before = urllib.parse.urlencode({"rcpt_to": recipient}).encode() + b"&msg_base64="
        self._after = b"&" + urllib.parse.urlencode({"secret": secret}).encode()
        # Bytes. What base64 alone makes too large is not even encoded.
        self.size = len(self._before) + len(self._after) + 4 * message.size // 3
        if self.size <= MAX_FORM:
            self.size = sum(len(piece) for piece in self.pieces())

    def pieces(self) -> Iterator[bytes]:
        """The body; a small one is one piece."""
        text = self._before
        for piece in self._message.pieces():
            # Percent-encoding of what base64 has besides letters and digits.
            encoded = base64.b64encode(piece).replace(b"+", b"%2B").replace(b"/", b"%2F").replace(b"=", b"%3D")
            if len(text) > len(self._before):
                yield text
                text = b""
            text += encoded
        yield text + self._after


def interpret(status: int, answer: bytes) -> Verdict:
    """Zulip's answer (HTTP status and body) as a verdict."""
    try:
        data = json.loads(answer)
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        data = {}
    message = data.get("msg")
    message = message if isinstance(message, str) else ""
    if status == 200 and data.get("result") == "success":
        return Delivered()
    if status == 200:
        return Deferred("4.3.5", "strange answer", "200, but not Zulip's answer: does a proxy answer in its place?")
    if status == 400 and data.get("result") == "error":
        verdict = re.match(r"(5\.\d{1,3}\.\d{1,3}) (.*)", message, re.DOTALL)
        if verdict:
            return on_address(verdict[1], verdict[2])
        return Deferred("4.3.5", "faulty request", f"Zulip finds the gateway's request faulty: {redact(message)}")
    if status == 403:
        return Deferred(
            "4.7.8",
            "access denied",
            "Zulip denies access (403): its shared secret has changed, or the request did not come from "
            "127.0.0.1; restart Zulip if it was not restarted since, and run playbooks/site.yml",
        )
    if status in (500, 502, 503, 504):
        return Deferred(
            "4.3.2",
            f"HTTP {status}",
            f"Zulip is in trouble (HTTP {status}); look at: supervisorctl status, /var/log/zulip/errors.log",
            in_doubt=status == 504,
        )
    return Deferred(
        "4.3.5",
        f"HTTP {status}",
        f"HTTP {status} without a verdict on the mail: is it Zulip that answers, and does it know this host's name?",
    )


def _cut(sock: socket.socket) -> None:
    """End a connection that somebody reads from."""
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def _read(
    connection: http.client.HTTPConnection, response: http.client.HTTPResponse, deadline: Deadline, timeout: float
) -> bytes:
    """Read an answer in pieces, so that one that trickles cannot hold us."""
    answer = b""
    while len(answer) < _MAX_ANSWER:
        seconds = deadline.left(timeout)
        if connection.sock is not None:
            connection.sock.settimeout(seconds)
        piece = response.read1(_MAX_ANSWER)
        if not piece:
            break
        answer += piece
    if response.length:
        raise http.client.IncompleteRead(answer, response.length)
    return answer
