"""The way into Zulip: which of the two back ends gateway.conf asks for.

Zulip 10 and earlier have an internal HTTP endpoint (backend_http), Zulip 11 and
later an SMTP server of their own (backend_smtp). The scheme of the URL tells.
"""

from __future__ import annotations

import urllib.parse
from typing import Protocol

from .backend_http import HttpBackend
from .backend_smtp import SmtpBackend
from .config import Config
from .verdict import Deferred, Delivered, Refused, Verdict

# A token that no channel has: Zulip makes them from 128 random bits.
_NO_CHANNEL = "0" * 32


class Backend(Protocol):
    """Hands mails to Zulip."""

    # What is worth remembering for the next hand-over; None: nothing.
    endpoint: str | None

    def hand_over(self, recipient: str, message: bytes) -> Verdict:
        """Hand one mail over; never raises for trouble of the back end."""
        ...


def open_backend(config: Config, endpoint: str | None = None) -> Backend:
    """The back end for gateway.conf's url; endpoint: what served last time."""
    url = urllib.parse.urlsplit(config.url)
    if url.scheme == "smtp":
        return SmtpBackend(url.hostname or "127.0.0.1", url.port or 25, config.timeout)
    return HttpBackend(config.url, config.secret(), config.timeout, endpoint)


def prove(backend: Backend, config: Config) -> Verdict:
    """Prove that Zulip would take mail: it has to refuse one that can be no mail.

    It looks at the credential first, at the address next; that it finds the
    address unknown proves the way, the credential and EMAIL_GATEWAY_PATTERN, and
    counts in none of its limits.
    """
    verdict = backend.hand_over(config.pattern.address(_NO_CHANNEL), b"")
    if isinstance(verdict, Refused) and verdict.cause == "unknown address":
        return Delivered(f"Zulip takes mail at {config.url}")
    if isinstance(verdict, Deferred):
        return verdict
    return Deferred("4.3.5", "strange answer", f"{config.url} takes mail for an address that no channel has")
