"""A real mail through port 25, followed until it is posted: does mail work, and where does it take its time?

It goes the way that all mail goes, so it takes a place in Zulip's rate limit, and stands in the channel.
"""

from __future__ import annotations

import email.utils
import re
import smtplib
import time
from collections.abc import Callable
from email.message import EmailMessage

from .config import Config
from .journal import Journal

HOST, PORT = "127.0.0.1", 25
# Wait so long for it to be posted (seconds), and look so often.
PATIENCE, PAUSE = 120.0, 0.1
_QUEUED = re.compile(r"queued as (\w+)")


def probe(config: Config, recipient: str, say: Callable[[str], None], patience: float = PATIENCE) -> float | None:
    """Send a mail and say what becomes of it. Seconds from the connection to posted; None if it was not posted in
    time, or at all. Raises Trouble where the journal cannot be read."""
    began = time.monotonic()

    def passed() -> str:
        return f"after {time.monotonic() - began:.2f} s"

    try:
        queue_id = _sent(config, recipient)
    except (OSError, smtplib.SMTPException) as error:
        say(f"Port 25 has not taken it: {_said(error)}")
        return None
    say(f"Postfix has accepted it {passed()}, as {queue_id}")
    journal, with_zulip = Journal(config.state_dir, create=False), False
    while time.monotonic() - began < patience:
        state, reason = journal.mail_of(queue_id)
        if state == "delivered":
            say(f"{reason[:1].upper()}{reason[1:]} {passed()}")
            return time.monotonic() - began
        if state == "refused":
            say(f"It was refused {passed()}: {reason}")
            return None
        if state == "open" and not with_zulip:
            say(f"It is handed over to Zulip {passed()}")
            with_zulip = True
        time.sleep(PAUSE)
    waits = f"; last it was told to wait: {reason}" if state == "deferred" else ""
    say(f"It has not been posted within {patience:.0f} s{waits}; look at: zulip-email-gateway doctor")
    return None


def _sent(config: Config, recipient: str) -> str:
    """The queue ID; raises OSError and SMTPException."""
    domain = config.pattern.domain
    mail = EmailMessage()
    mail["From"] = f"Zulip email gateway <postmaster@{domain}>"
    mail["To"] = recipient
    mail["Subject"] = "Email gateway: probe"
    mail["Date"] = email.utils.formatdate()
    mail["Message-ID"] = email.utils.make_msgid(domain=domain)
    mail.set_content("This mail was sent by the email gateway, to see whether mail is posted.")
    with smtplib.SMTP(HOST, PORT, local_hostname=domain, timeout=60) as server:
        server.ehlo_or_helo_if_needed()
        for code, text in (server.mail(f"postmaster@{domain}"), server.rcpt(recipient)):
            if code != 250:
                raise smtplib.SMTPResponseException(code, text)
        code, text = server.data(mail.as_bytes(policy=mail.policy.clone(linesep="\r\n")))
    found = _QUEUED.search(text.decode("ascii", "replace"))
    if code != 250 or found is None:
        raise smtplib.SMTPResponseException(code, text)
    return found[1]


def _said(error: Exception) -> str:
    if isinstance(error, smtplib.SMTPResponseException):
        text = error.smtp_error.decode("ascii", "replace") if isinstance(error.smtp_error, bytes) else error.smtp_error
        return f"{error.smtp_code} {text}"
    return str(error)
