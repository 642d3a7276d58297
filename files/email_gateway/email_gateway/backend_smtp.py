"""The hand-over to Zulip 11 and later: its own SMTP server.

That server (zerver/lib/email_mirror_server.py, on aiosmtpd) answers trouble that
passes with permanent codes: 550 4.7.0 for its rate limit, 500 for any exception.
Only 550 5.1.1 and 550 5.7.1 after RCPT are verdicts on the mail. Each RCPT to a
channel that it accepts spends one unit of its rate limit.
"""

from __future__ import annotations

import ipaddress
import smtplib
import ssl
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from .backend import MAX_IDLE, Pool
from .deadline import Deadline
from .header_repair import NeverAccepted, enterable
from .message import PIECE, Message, stored
from .verdict import NO_ANSWER, RATE_LIMITED, Deferred, Delivered, Refused, Verdict, on_address, one_line
from .wire_format import write_wire_format

# Zulip's verdicts on an address, by enhanced status code.
_VERDICTS = {"5.1.1": "Bad destination mailbox address", "5.7.1": "Permission denied"}
# What aiosmtpd says of a message over its limit (its smtp.py), code and status aside.
_TOO_MUCH = "Too much mail data"
# aiosmtpd's own limit (bytes), which Zulip leaves as it is; another one is another server's.
_ZULIPS_LIMIT = 2**25
# Seconds for a polite end, which nobody waits for.
_GOODBYE = 1.0
# The longest line of an answer (RFC 5321, 4.5.3.1.5, and some more; bytes).
_MAX_LINE = 2**13


class _Session(smtplib.SMTP):
    """A session all of whose steps together keep to a deadline, `timeout` seconds each."""

    def __init__(self, host: str, port: int, timeout: float, deadline: Deadline) -> None:
        """Connect and be greeted; raises what smtplib raises."""
        self.deadline = deadline
        super().__init__(host, port, local_hostname="localhost", timeout=deadline.left(timeout))
        self.timeout = timeout

    def renew(self, deadline: Deadline) -> None:
        """For the next mail."""
        self.deadline = deadline
        assert self.sock is not None
        self.sock.settimeout(deadline.left(self.timeout))

    def getreply(self) -> tuple[int, bytes]:
        if self.file is None:
            self.file = _Lines(self)
        return super().getreply()

    def send_all(self, file: BinaryIO) -> None:
        """Send a message that is in wire format, and its end."""
        assert self.sock is not None
        file.seek(0)
        while piece := file.read(PIECE):
            self.sock.settimeout(self.deadline.left(self.timeout))
            self.sock.sendall(piece)
        self.sock.sendall(b".\r\n")


class _Lines:
    """What a session's answers are read from, so that one that trickles cannot hold us."""

    def __init__(self, session: _Session) -> None:
        self._session = session
        self._read = b""

    def readline(self, limit: int = _MAX_LINE) -> bytes:
        """As of a file; raises TimeoutError."""
        session = self._session
        while b"\n" not in self._read and len(self._read) < limit:
            assert session.sock is not None
            session.sock.settimeout(session.deadline.left(session.timeout))
            piece = session.sock.recv(_MAX_LINE)
            if not piece:
                break
            self._read += piece
        end = min(self._read.find(b"\n") + 1 or limit, limit)
        line, self._read = self._read[:end], self._read[end:]
        return line

    def close(self) -> None:
        """Nothing to do: the socket is the session's."""


# Where zulip-email-gateway-server.service has Zulip's mail server listen, on loopback.
OUR_PORT = 10525


class SmtpBackend:
    """Hands mails to Zulip's SMTP server at `host`:`port`.

    timeout: seconds for each answer; twice that bounds the whole hand-over.
    """

    endpoint: str | None = None

    def __init__(self, host: str, port: int, timeout: float) -> None:
        self._host, self._port = host, port
        self._timeout = timeout
        self._where = f"{host}:{port}"
        self._is_loopback = host == "localhost" or _is_loopback(host)
        # What else is on loopback is a container's published port.
        self._is_ours = self._is_loopback and port == OUR_PORT
        self.said_500 = False
        self._pool: Pool[_Session] = Pool(lambda session: session.sock, _end)

    def close_idle(self, seconds: float = MAX_IDLE) -> None:
        """End the sessions that were not used for so long (seconds)."""
        self._pool.close_idle(seconds)

    def hand_over(self, recipient: str, message: Message, spool: Path) -> Verdict:
        """Hand one mail over; never raises for trouble of the back end."""
        try:
            with stored(spool) as text:
                write_wire_format(enterable(message, spool).file(), text)
                return self._hand_over(recipient, text, text.tell(), Deadline(2 * self._timeout))
        except NeverAccepted as why:
            return Refused("5.6.0", "unacceptable", f"Zulip cannot take it in: {why}")
        except OSError as error:
            reason = f"cannot store a message in {spool}: {error.strerror}; look at its free space"
            return Deferred("4.3.0", "spool", reason)

    def knows(self, recipient: str, spool: Path) -> Verdict:
        """See Backend."""
        return self._hand_over(recipient, None, 0, Deadline(2 * self._timeout))

    def _hand_over(self, recipient: str, text: BinaryIO | None, size: int, deadline: Deadline) -> Verdict:
        """Up to RCPT without a text."""
        session = self._pool.take()
        is_used = session is not None
        while True:
            counted = False
            try:
                if session is None:
                    session = self._session(deadline)
                session.renew(deadline)
                size_limit = session.esmtp_features.get("size", "")
                limit = int(size_limit) if size_limit.isdecimal() else 0
                if limit and size > limit:
                    self._pool.give(session)
                    if limit == _ZULIPS_LIMIT:
                        return _too_large(f"{size} bytes, and Zulip takes {limit}")
                    what = f"{self._where} takes {limit} bytes and not {_ZULIPS_LIMIT}: is it Zulip's mail server?"
                    return Deferred("4.3.5", "SIZE", what)
                # The sender means nothing to Zulip. The null one is never found faulty.
                code, answer = session.mail("", [f"size={size}"] if limit else [])
                if code != 250:
                    _end(session)
                    return self._other(code, answer)
                code, answer = session.rcpt(recipient)
                if code != 250:
                    verdict = self._on_recipient(code, answer)
                    self._give_back(session)
                    return verdict
                counted = True
                if text is None:
                    self._give_back(session)
                    return Delivered()
                code, answer = session.docmd("DATA")
                if code == 354:
                    session.send_all(text)
                    code, answer = session.getreply()
                if code == 250:
                    self._pool.give(session)
                    return Delivered()
                _end(session)
                return self._after_data(code, answer)
            except (OSError, smtplib.SMTPException) as error:
                if session is not None:
                    session.close()
                if is_used and not counted and not isinstance(error, TimeoutError):
                    # It was closed meanwhile; nothing was handed over yet.
                    session, is_used = None, False
                    continue
                return self._failed(error, counted)

    def _failed(self, error: Exception, counted: bool) -> Deferred:
        if isinstance(error, smtplib.SMTPResponseException):
            return self._other(error.smtp_code, error.smtp_error)._replace(counted=counted)
        if isinstance(error, ConnectionRefusedError):
            return Deferred("4.4.1", "connection refused", f"nothing listens on {self._where}; {self._look_at}")
        if isinstance(error, TimeoutError) or isinstance(error.__context__, TimeoutError):  # smtplib hides it
            what = f"Zulip at {self._where} did not answer within {self._timeout:g} s; {self._look_at}"
            return Deferred("4.4.2", NO_ANSWER, what, in_doubt=counted)
        if isinstance(error, ssl.SSLError):
            return Deferred("4.7.5", "TLS", f"TLS with {self._where} failed: {error.reason}; {self._look_at}")
        what = f"the connection to {self._where} broke: {type(error).__name__}: {one_line(str(error), 200)}"
        return Deferred("4.4.2", "connection broken", what, in_doubt=counted)

    @property
    def _look_at(self) -> str:
        if self._is_ours:
            return "look at: systemctl status zulip-email-gateway-server, /var/log/zulip/errors.log"
        where = "Zulip's container (does it run, and is its port 25 published there?) or " if self._is_loopback else ""
        return f"look at {where}Zulip's host: supervisorctl status, /var/log/zulip/errors.log"

    def _session(self, deadline: Deadline) -> _Session:
        """A new session, past the greeting; raises what smtplib raises."""
        session = _Session(self._host, self._port, self._timeout, deadline)
        try:
            self._greet(session)
        except BaseException:
            session.close()
            raise
        return session

    def _give_back(self, session: _Session) -> None:
        """After a recipient was refused: the session serves on if it can be reset."""
        try:
            code, _ = session.rset()
        except (OSError, smtplib.SMTPException):
            code = 0
        if code == 250:
            self._pool.give(session)
        else:
            _end(session)

    def _greet(self, session: _Session) -> None:
        """Introduce ourselves; raises what smtplib raises."""
        session.ehlo_or_helo_if_needed()
        # Across a network encrypted where Zulip offers it. Its certificate may be
        # self-signed, as with every mail server.
        if not self._is_loopback and session.has_extn("starttls"):
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            code, answer = session.starttls(context=context)
            if code != 220:
                raise smtplib.SMTPResponseException(code, answer)
            session.ehlo()

    def _on_recipient(self, code: int, answer: bytes) -> Verdict:
        status, _, text = _text(answer).partition(" ")
        # With Zulip's own words: another server in its place, with the same codes, is trouble.
        if code == 550 and text.startswith(_VERDICTS.get(status, "\0")):
            return on_address(status, text)
        if status == "4.7.0":
            return Deferred("4.7.28", RATE_LIMITED, "Zulip's rate limit is used up, by its own account")
        return self._other(code, answer)

    def _after_data(self, code: int, answer: bytes | str) -> Verdict:
        # With aiosmtpd's own words: from another server 552 can also mean a full mailbox.
        if code == 552 and _text(answer).endswith(_TOO_MUCH):
            return _too_large(_text(answer))
        verdict = self._other(code, answer)
        return verdict._replace(counted=True)

    def _other(self, code: int, answer: bytes | str) -> Deferred:
        what = f"Zulip's mail server at {self._where} answers {code} {_text(answer)}"
        self.said_500 = self.said_500 or (code == 500 and self._is_ours)
        return Deferred("4.3.2", f"SMTP {code}", f"{what}; {self._look_at}")


def _end(session: _Session) -> None:
    """End a session, politely if that takes no time."""
    with suppress(OSError, smtplib.SMTPException):
        session.deadline = Deadline(_GOODBYE)
        session.putcmd("quit")
    session.close()


def _text(answer: bytes | str) -> str:
    return one_line(answer.decode("utf-8", "replace") if isinstance(answer, bytes) else answer, 300)


def _too_large(why: str) -> Refused:
    return Refused("5.3.4", "too large", f"the message is too large for Zulip: {why}")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
