"""The way into Zulip: which of the two back ends gateway.conf asks for.

Zulip 10 and earlier have an internal HTTP endpoint (backend_http), Zulip 11 and
later an SMTP server of their own (backend_smtp). The scheme of the URL tells.
"""

from __future__ import annotations

import select
import socket
import time
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Generic, Protocol, TypeVar

from .config import Config
from .message import Message
from .verdict import UNKNOWN_ADDRESS, Deferred, Delivered, Refused, Verdict

# A token that no channel has: Zulip makes them from 128 random bits.
_NO_CHANNEL = "0" * 32
# A connection that has not been used for so long (seconds) is not used any more. Zulip's
# web server closes it after 65.
MAX_IDLE = 30.0


class Backend(Protocol):
    """Hands mails to Zulip, for several threads at a time."""

    # What is worth remembering for the next hand-over; None: nothing.
    endpoint: str | None
    # Zulip's mail server on this host has failed with something (revival.py).
    said_500: bool

    def hand_over(self, recipient: str, message: Message, spool: Path) -> Verdict:
        """Hand one mail over; never raises for trouble of the back end.

        spool: the folder for a mail that has to be written in another form.
        """
        ...

    def knows(self, recipient: str, spool: Path) -> Verdict:
        """Ask whether Zulip takes mail for an address, without giving it any: Delivered or Refused, or
        Deferred where it does not say. Costs a channel's place in the rate limit, all the same."""
        ...

    def close_idle(self, seconds: float = MAX_IDLE) -> None:
        """Close the connections that were not used for so long (seconds)."""
        ...


Connection = TypeVar("Connection")


class Pool(Generic[Connection]):
    """Connections that wait for their next use.

    socket_of: the socket of a connection; close: closes one.
    """

    def __init__(
        self, socket_of: Callable[[Connection], socket.socket | None], close: Callable[[Connection], None]
    ) -> None:
        self._socket_of, self._close = socket_of, close
        self._waiting: list[tuple[Connection, float]] = []
        self._lock = Lock()

    def take(self) -> Connection | None:
        """One that the other side has not closed; None if there is none."""
        while True:
            with self._lock:
                if not self._waiting:
                    return None
                connection, since = self._waiting.pop()
            if time.monotonic() - since < MAX_IDLE and _is_quiet(self._socket_of(connection)):
                return connection
            self._close(connection)

    def give(self, connection: Connection) -> None:
        """Put one back that serves on."""
        with self._lock:
            self._waiting.append((connection, time.monotonic()))

    def close_idle(self, seconds: float) -> None:
        """Close those that were not used for so long."""
        now = time.monotonic()
        with self._lock:
            old = [one for one, since in self._waiting if now - since >= seconds]
            self._waiting = [(one, since) for one, since in self._waiting if now - since < seconds]
        for connection in old:
            self._close(connection)


def _is_quiet(sock: socket.socket | None) -> bool:
    """True if nothing has come since the last answer: what would come is the end."""
    if sock is None:
        return False
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return not poll.poll(0)


def open_backend(config: Config, endpoint: str | None = None) -> Backend:
    """The back end for gateway.conf's url; endpoint: what served last time."""
    url = urllib.parse.urlsplit(config.url)
    # Only what is needed is imported: it stays in memory for good.
    if url.scheme == "smtp":
        from .backend_smtp import SmtpBackend

        return SmtpBackend(url.hostname or "127.0.0.1", url.port or 25, config.timeout)
    from .backend_http import HttpBackend

    return HttpBackend(config.url, config.secret(), config.timeout, endpoint)


def prove(backend: Backend, config: Config, spool: Path) -> Verdict:
    """Prove that Zulip would take mail: it has to refuse one that can be no mail.

    It looks at the credential first, at the address next; that it finds the
    address unknown proves the way, the credential and EMAIL_GATEWAY_PATTERN, and
    counts in none of its limits.
    """
    verdict = backend.knows(config.pattern.address(_NO_CHANNEL), spool)
    if isinstance(verdict, Refused) and verdict.cause == UNKNOWN_ADDRESS:
        return Delivered(f"Zulip takes mail at {config.url}")
    if isinstance(verdict, Deferred):
        return verdict
    return Deferred("4.3.5", "strange answer", f"{config.url} takes mail for an address that no channel has")
