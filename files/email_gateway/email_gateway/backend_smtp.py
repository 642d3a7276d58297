"""The hand-over to Zulip 11 and later: its own SMTP server.

That server (zerver/lib/email_mirror_server.py, on aiosmtpd) answers trouble that
passes with permanent codes: 550 4.7.0 for its rate limit, 500 for any exception.
Only 550 5.1.1 and 550 5.7.1 after RCPT are verdicts on the mail. Each RCPT to a
channel that it accepts spends one unit of its rate limit.
"""

from __future__ import annotations

import ipaddress
import re
import smtplib
import ssl
from contextlib import suppress

from .verdict import RATE_LIMITED, Deferred, Delivered, Refused, Verdict, on_address, one_line

# RFC 5321, 4.5.3.1.6: aiosmtpd takes no longer line (octets without CRLF).
_MAX_LINE = 998
# Zulip's verdicts on an address, by enhanced status code.
_VERDICTS = {"5.1.1": "Bad destination mailbox address", "5.7.1": "Permission denied"}
# What aiosmtpd says of a message over its limit (its smtp.py), code and status aside.
_TOO_MUCH = "Too much mail data"
_LINE_END = re.compile(rb"\r\n|\r|\n")


class SmtpBackend:
    """Hands mails to Zulip's SMTP server at `host`:`port`.

    timeout: seconds for each answer.
    """

    endpoint: str | None = None

    def __init__(self, host: str, port: int, timeout: float) -> None:
        self._host, self._port = host, port
        self._timeout = timeout
        self._where = f"{host}:{port}"
        self._is_local = host == "localhost" or _is_loopback(host)

    def hand_over(self, recipient: str, message: bytes) -> Verdict:
        """Hand one mail over; never raises for trouble of the back end."""
        text = wire_format(message)
        counted = False
        smtp = None
        try:
            smtp = smtplib.SMTP(self._host, self._port, local_hostname="localhost", timeout=self._timeout)
            self._greet(smtp)
            limit = int(smtp.esmtp_features.get("size") or 0)
            if limit and len(text) > limit:
                return _too_large(f"{len(text)} bytes, and Zulip takes {limit}")
            # The sender means nothing to Zulip. The null one is never found faulty.
            code, answer = smtp.mail("", [f"size={len(text)}"] if limit else [])
            if code != 250:
                return self._other(code, answer)
            code, answer = smtp.rcpt(recipient)
            if code != 250:
                return self._on_recipient(code, answer)
            counted = True
            code, answer = smtp.data(text)
            return Delivered() if code == 250 else self._after_data(code, answer)
        except smtplib.SMTPDataError as error:
            return self._after_data(error.smtp_code, error.smtp_error)
        except smtplib.SMTPResponseException as error:
            return self._other(error.smtp_code, error.smtp_error)
        except ConnectionRefusedError:
            return Deferred("4.4.1", "connection refused", f"nothing listens on {self._where}; {self._look_at}")
        except TimeoutError:
            return self._silent(counted)
        except ssl.SSLError as error:
            return Deferred("4.7.5", "TLS", f"TLS with {self._where} failed: {error.reason}; {self._look_at}")
        except (OSError, smtplib.SMTPException) as error:
            if isinstance(error.__context__, TimeoutError):  # smtplib hides it
                return self._silent(counted)
            what = f"the connection to {self._where} broke: {type(error).__name__}: {one_line(str(error), 200)}"
            return Deferred("4.4.2", "connection broken", what, in_doubt=counted)
        finally:
            if smtp is not None:
                with suppress(OSError, smtplib.SMTPException):
                    smtp.quit()
                smtp.close()

    @property
    def _look_at(self) -> str:
        if self._is_local:
            return "look at: systemctl status zulip-email-gateway-server, /var/log/zulip/email_server.log"
        return "look at Zulip's host: supervisorctl status, /var/log/zulip/email_server.log"

    def _greet(self, smtp: smtplib.SMTP) -> None:
        """Introduce ourselves; raises what smtplib raises."""
        smtp.ehlo_or_helo_if_needed()
        # Across a network encrypted where Zulip offers it. Its certificate may be
        # self-signed, as with every mail server.
        if not self._is_local and smtp.has_extn("starttls"):
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            code, answer = smtp.starttls(context=context)
            if code != 220:
                raise smtplib.SMTPResponseException(code, answer)
            smtp.ehlo()

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
        return verdict._replace(in_doubt=True)  # the RCPT was counted

    def _silent(self, counted: bool) -> Deferred:
        what = f"Zulip at {self._where} did not answer within {self._timeout:g} s; {self._look_at}"
        return Deferred("4.4.2", "no answer", what, in_doubt=counted)

    def _other(self, code: int, answer: bytes | str) -> Deferred:
        what = f"Zulip's mail server at {self._where} answers {code} {_text(answer)}"
        return Deferred("4.3.2", f"SMTP {code}", f"{what}; {self._look_at}")


def wire_format(message: bytes) -> bytes:
    """`message` as SMTP wants it: CRLF, and no line over 998 octets.

    A longer line goes on in the next one behind a space, as with Postfix' own SMTP
    client (postconf(5), smtp_line_length_limit).
    """
    lines = []
    for line in _LINE_END.split(message):
        head, rest = line[:_MAX_LINE], line[_MAX_LINE:]
        lines.append(head)
        while rest:
            lines.append(b" " + rest[: _MAX_LINE - 1])
            rest = rest[_MAX_LINE - 1 :]
    return b"\r\n".join(lines)


def _text(answer: bytes | str) -> str:
    return one_line(answer.decode("utf-8", "replace") if isinstance(answer, bytes) else answer, 300)


def _too_large(why: str) -> Refused:
    return Refused("5.3.4", "too large", f"the message is too large for Zulip: {why}")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
