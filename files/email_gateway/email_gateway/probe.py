"""A real mail through port 25, followed until it is posted: does mail work, and where does it take its time?

It goes the way that all mail goes, so it takes a place in Zulip's rate limit, and stands in the channel.
"""

from __future__ import annotations

import re
import smtplib
import time
from collections.abc import Callable
from typing import NamedTuple

from .config import Config
from .journal import Journal
from .own_mail import own_mail
from .postfix import PORT_25
from .verdict import ACCEPTED, POSTED, WAITING

# Wait so long for it to be posted (seconds), and look so often.
PATIENCE, PAUSE = 120.0, 0.1
# One that was not posted is followed again, and no other sent, for so long (seconds; maximal_queue_lifetime).
GIVEN_UP = 5 * 86400
_QUEUED = re.compile(r"queued as (\w+)")


class Sent(NamedTuple):
    """A mail that Postfix has accepted. at: Unix seconds; after: Journal.last_mail before it was sent."""

    at: float
    queue_id: str
    after: int


def send(config: Config, recipient: str, say: Callable[[str], None]) -> Sent | None:
    """Send a mail through port 25, and say what came of that; None where it was not accepted. Raises Trouble."""
    at, after = time.time(), Journal(config.state_dir, create=False).last_mail()
    try:
        sent = Sent(at, _sent(config, recipient), after)
    except (OSError, smtplib.SMTPException) as error:
        say(f"Port 25 has not taken it: {_said(error)}")
        return None
    say(f"Postfix has accepted it {_passed(sent)}, as {sent.queue_id}")
    return sent


def still_waits(config: Config, sent: Sent) -> bool:
    """True if the mail may still be posted. Raises Trouble."""
    state, _, _ = Journal(config.state_dir, create=False).mail_of(sent.queue_id, sent.after)
    return state not in ("delivered", "refused") and sent.at > time.time() - GIVEN_UP


def follow(config: Config, sent: Sent, say: Callable[[str], None], patience: float = PATIENCE) -> float | None:
    """Say what becomes of the mail. Seconds from when it was sent to posted; None if it was not posted in time, or
    at all. Raises Trouble where the journal cannot be read."""
    journal, with_zulip, end = Journal(config.state_dir, create=False), False, time.monotonic() + patience
    while True:
        state, cause, reason = journal.mail_of(sent.queue_id, sent.after)
        if state == "delivered":
            say(f"{reason[:1].upper()}{reason[1:]} {_passed(sent)}")
            return time.time() - sent.at if cause in (POSTED, ACCEPTED) else None
        if state == "refused":
            say(f"It was refused {_passed(sent)}: {reason}")
            return None
        if state in ("open", WAITING) and not with_zulip:
            say(f"It is handed over to Zulip {_passed(sent)}")
            with_zulip = True
        if time.monotonic() > end:
            break
        time.sleep(PAUSE)
    waits = f"; last it was told to wait: {reason}" if state == "deferred" else ""
    say(f"It has not been posted within {patience:.0f} s{waits}; look at: zulip-email-gateway doctor")
    return None


def _passed(sent: Sent) -> str:
    return f"after {time.time() - sent.at:.2f} s"


def _sent(config: Config, recipient: str) -> str:
    """The queue ID; raises OSError and SMTPException."""
    domain = config.pattern.domain
    words = "This mail was sent by the email gateway, to see whether mail is posted."
    mail = own_mail(domain, recipient, "Email gateway: probe", words)
    with smtplib.SMTP(*PORT_25, local_hostname=domain, timeout=60) as server:
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
