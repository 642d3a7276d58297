"""The one thing a delivery returns, and how Postfix and other clients are told about it.

Only this module knows exit statuses and the line that pipe(8) reads. Postfix
bounces on every exit status but 75 and 71, and takes output that begins with an
enhanced status code (RFC 3463) before the exit status; so the line starts with
the code, and everything that is no verdict on the mail itself ends with 75.
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from .addresses import redact

# sysexits(3)
EX_OK = 0
EX_UNAVAILABLE = 69
EX_TEMPFAIL = 75

# Postfix turns every 5.x.x whose text does not start with this into 4.3.0
# (zulip_delivery_status in the Postfix role): a crash cannot bounce a mail.
SIGNATURE = "Zulip mail gateway:"

# The cause of a mail that waits for Zulip's rate limit.
RATE_LIMITED = "rate limit"
# The cause of a mail that Zulip was given and did not answer for.
NO_ANSWER = "no answer"
# The cause of a mail in which Zulip finds nothing to post.
NO_TEXT = "no text"
# The cause of a mail to an address that Zulip does not know.
UNKNOWN_ADDRESS = "unknown address"
# The cause of a mail whose delivery was not begun because the service ends.
STOPPING = "stopping"

# What is known of a mail that was delivered: that Zulip has posted it; that Zulip has accepted
# it, which is all that can be known; that Zulip makes nothing of it, on purpose; that Zulip has
# accepted it, and will say what became of it.
POSTED, ACCEPTED, DROPPED, WAITING = "posted", "accepted", "dropped", "waiting"

# What the sender is told to do about an address that Zulip does not know.
COPY_AGAIN = "please copy the address from Zulip again"

# An enhanced status code (RFC 3463).
_STATUS = re.compile(r"[245](\.\d{1,3}){2}")
# What Zulip says of an address that does not match its EMAIL_GATEWAY_PATTERN. Ours
# all do, so this is a verdict on the settings and not on the mail.
_NOT_OUR_PATTERN = "Address not recognized by gateway"


class Delivered(NamedTuple):
    """Zulip has the mail. cause: what is known of it, POSTED to WAITING."""

    note: str = "accepted by Zulip"
    cause: str = ACCEPTED


class Deferred(NamedTuple):
    """Trouble that may pass; the mail stays in the queue.

    status: enhanced status code 4.x.y (RFC 3463); cause: a short, stable key to
    count by; reason: what is wrong and what the operator should look at.
    in_doubt: there was no answer; the mail may have reached Zulip all the same.
    counted: the mail has not, but counts in Zulip's rate limit.
    """

    status: str
    cause: str
    reason: str
    in_doubt: bool = False
    counted: bool = False


class Refused(NamedTuple):
    """A verdict on the mail itself; its sender is told.

    status: enhanced status code 5.x.y (RFC 3463); cause: as in Deferred;
    reason: plain words for the sender, no secret in them.
    """

    status: str
    cause: str
    reason: str


Verdict = Delivered | Deferred | Refused


def on_address(status: str, text: str) -> Verdict:
    """What Zulip's 5.x.x on an address means: a verdict, or a wrong setting."""
    if _NOT_OUR_PATTERN in text:
        reason = (
            "Zulip's EMAIL_GATEWAY_PATTERN is not the gateway's, or Zulip was not restarted since; run "
            "playbooks/site.yml, or where Zulip is not on this host set it there (settings.py; for a container "
            "SETTING_EMAIL_GATEWAY_PATTERN)"
        )
        return Deferred("4.3.5", "Zulip's pattern", reason)
    return Refused(status, UNKNOWN_ADDRESS, f"{redact(text)}; {COPY_AGAIN}")


class Trouble(Exception):
    """Raised where a Deferred cannot be returned; carries it."""

    def __init__(self, status: str, cause: str, reason: str) -> None:
        super().__init__(reason)
        self.verdict = Deferred(status, cause, reason)


def bug(error: BaseException) -> Deferred:
    """An error of our own as a verdict, with the place where it happened."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    where = f"{os.path.basename(frame.tb_frame.f_code.co_filename)}:{frame.tb_lineno}" if frame else "?"
    reason = f"error in the gateway itself, please report it: {type(error).__name__}: {redact(str(error))} ({where})"
    return Deferred("4.3.0", "bug", reason)


def one_line(text: str, limit: int = 700) -> str:
    """Fold any text into one printable line of at most `limit` characters."""
    text = re.sub(" +", " ", "".join(sign if sign.isprintable() else " " for sign in text)).strip()
    return text if len(text) <= limit else text[: limit - 3] + "..."


def pipe_line(verdict: Verdict) -> str:
    """The line for pipe(8): status code first, then one line of text."""
    if isinstance(verdict, Delivered):
        return f"2.0.0 {one_line(verdict.note)}"
    if isinstance(verdict, Deferred):
        return f"{verdict.status} {one_line(redact(verdict.reason))}"
    return f"{verdict.status} {SIGNATURE} {one_line(redact(verdict.reason))}"


def exit_status(verdict: Verdict) -> int:
    """The exit status for pipe(8), see sysexits(3)."""
    if isinstance(verdict, Delivered):
        return EX_OK
    if isinstance(verdict, Deferred):
        return EX_TEMPFAIL
    return EX_UNAVAILABLE


def answer(verdict: Verdict) -> str:
    """What the service tells its client: exit status and line for pipe(8), then the cause."""
    return f"{exit_status(verdict)} {pipe_line(verdict)}\n{verdict.cause}\n"


def understood(status: int, line: str, cause: str) -> Verdict:
    """The verdict that the service told with answer()."""
    code, _, text = line.partition(" ")
    if status == EX_OK:
        return Delivered(text, cause)
    if status == EX_UNAVAILABLE and _STATUS.fullmatch(code) and code[0] == "5":
        return Refused(code, cause, text.removeprefix(f"{SIGNATURE} "))
    if _STATUS.fullmatch(code) and code[0] == "4":
        return Deferred(code, cause, text)
    return Deferred("4.3.2", "service", f"the service answers {line[:60]!r}")
