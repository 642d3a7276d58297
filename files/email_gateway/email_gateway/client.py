"""What the poller and the commands of an operator ask the service."""

from __future__ import annotations

from typing import BinaryIO

from .submission import SOCKET, NoAnswer, ask
from .verdict import Deferred, Trouble, Verdict, understood

# Seconds for an answer that waits for nothing.
_SOON = 120.0


class Client:
    """The service at `socket`. seconds: how long an answer may take, for which nothing has to wait."""

    def __init__(self, seconds: float, socket: str = SOCKET) -> None:
        self._seconds = seconds
        self._socket = socket

    def deliver(self, file: BinaryIO, max_wait: float, **fields: str) -> Verdict:
        """Deliver the mail in an open file; fields as service.py knows them.

        max_wait: seconds to wait for Zulip's rate limit.
        """
        file.flush()
        request = ["deliver", f"max-wait={max_wait:g}", *(f"{name}={value}" for name, value in fields.items())]
        try:
            return understood(*ask(request, file.fileno(), max_wait + self._seconds, self._socket))
        except NoAnswer as error:
            return Deferred("4.3.2", "service", _what(error))

    def delivered(self, inbox: str, uids: list[int]) -> set[int]:
        """Which mails of an inbox Zulip has accepted; raises Trouble."""
        if not uids:
            return set()
        status, line, found = self.ask("delivered", inbox=inbox, uids=" ".join(map(str, uids)))
        if status:
            raise Trouble("4.3.2", "service", line)
        return {int(uid) for uid in found.split()}

    def ask(self, verb: str, **fields: str) -> tuple[int, str, str]:
        """Exit status, line and details of an answer; raises Trouble."""
        try:
            request = [verb, *(f"{name}={value}" for name, value in fields.items())]
            status, line, details = ask(request, None, max(_SOON, self._seconds), self._socket)
        except NoAnswer as error:
            raise Trouble("4.3.2", "service", _what(error)) from error
        return status, line, details


def _what(error: NoAnswer) -> str:
    return f"{error}; look at: systemctl status zulip-email-gateway"
