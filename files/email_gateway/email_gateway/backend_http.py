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
import ssl
import time
import urllib.parse

from .addresses import redact
from .verdict import Deferred, Delivered, Refused, Verdict, on_address

# The endpoint moved between Zulip 7 and 9: try, and remember.
PATHS = ("/email_mirror_message", "/api/internal/email_mirror_message")
# Django's DATA_UPLOAD_MAX_MEMORY_SIZE as Zulip sets it (bytes of the whole form).
MAX_FORM = 25 * 2**20
# An answer is a line of JSON; a page is cut off here (bytes).
_MAX_ANSWER = 64 * 2**10
_CONNECT_TIMEOUT = 10.0


class HttpBackend:
    """Hands mails to Zulip at `url`.

    secret: Zulip's shared secret. timeout: seconds for each read and write; twice
    that bounds the whole hand-over. endpoint: the path that served last time, or None.
    """

    def __init__(self, url: str, secret: str, timeout: float, endpoint: str | None = None) -> None:
        self._url = urllib.parse.urlsplit(url)
        self._secret = secret
        self._timeout = timeout
        self.endpoint: str | None = endpoint if endpoint in PATHS else PATHS[0]

    def form(self, recipient: str, message: bytes) -> bytes:
        """The request's body."""
        fields = {"rcpt_to": recipient, "msg_base64": base64.b64encode(message), "secret": self._secret}
        return urllib.parse.urlencode(fields).encode("ascii")

    def hand_over(self, recipient: str, message: bytes) -> Verdict:
        """Hand one mail over; never raises for trouble of the back end."""
        # Base64 makes 4 bytes of 3; what is too large by far is not even encoded.
        size = len(message) * 4 // 3
        if size <= MAX_FORM:
            body = self.form(recipient, message)
            size = len(body)
        if size > MAX_FORM:
            return Refused(
                "5.3.4",
                "too large",
                f"the message is too large for Zulip: {len(message)} bytes, which make {size} bytes "
                f"in the form that Zulip limits to {MAX_FORM}; about {MAX_FORM * 3 // 4} bytes of plain text fit",
            )
        give_up = time.monotonic() + 2 * self._timeout
        for path in sorted(PATHS, key=lambda path: path != self.endpoint):
            verdict = self._post(path, body, give_up)
            if verdict is not None:
                self.endpoint = path
                return verdict
        return Deferred(
            "4.3.5",
            "no endpoint",
            f"there is no mail endpoint at {self._url.geturl()} (404 for {' and '.join(PATHS)}): "
            "was Zulip upgraded to 11, or is the URL wrong? Run playbooks/site.yml",
        )

    def _post(self, path: str, body: bytes, give_up: float) -> Verdict | None:
        """One request; None for 404."""
        where = f"{self._url.hostname}:{self._url.port or (80 if self._url.scheme == 'http' else 443)}"
        connection = self._connection()
        sent = False
        try:
            connection.connect()
            assert connection.sock is not None
            connection.sock.settimeout(self._timeout)
            sent = True
            connection.request("POST", path, body, {"Content-Type": "application/x-www-form-urlencoded"})
            response = connection.getresponse()
            answer = _read(response, give_up)
            if response.status == 404:
                return None
            return interpret(response.status, answer)
        except ConnectionRefusedError:
            return Deferred(
                "4.4.1", "connection refused", f"nothing listens on {where}; look at: systemctl status nginx"
            )
        except TimeoutError:
            what = f"Zulip at {where} did not answer within {self._timeout:g} s"
            return Deferred("4.4.2", "no answer", f"{what}; look at: supervisorctl status zulip-django", in_doubt=sent)
        except ssl.SSLError as error:
            return Deferred("4.7.5", "TLS", f"TLS with {where} failed: {error.reason}; is the URL right?", sent)
        except (OSError, http.client.HTTPException) as error:
            what = f"the connection to {where} broke: {type(error).__name__}: {error}"
            return Deferred("4.4.2", "connection broken", what, in_doubt=sent)
        finally:
            connection.close()

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


def interpret(status: int, answer: bytes) -> Verdict:
    """Zulip's answer (HTTP status and body) as a verdict."""
    try:
        data = json.loads(answer)
    except ValueError:
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


def _read(response: http.client.HTTPResponse, give_up: float) -> bytes:
    """Read an answer in pieces, so that one that trickles can not hold us."""
    answer = b""
    while len(answer) < _MAX_ANSWER:
        piece = response.read1(_MAX_ANSWER)
        if not piece:
            break
        answer += piece
        if time.monotonic() > give_up:
            raise TimeoutError
    if response.length:
        raise http.client.IncompleteRead(answer, response.length)
    return answer
