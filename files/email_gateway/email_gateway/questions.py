"""Whether Zulip knows an address, before a mail for it is accepted.

What Zulip has said of it lately is good enough. Else Zulip is asked: up to version 10 with an
empty mail, of which its worker makes nothing; later with RCPT, as its mail server answers that
at once. A channel's address costs a place in the rate limit, a reply address nothing. Few
questions are asked, and fewer for a client whose questions turn out to be idle, so that junk
costs Zulip next to nothing.
"""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from threading import Condition
from typing import Any

from .addresses import Address
from .gateway import Gateway
from .journal import Journal, address_of
from .verdict import RATE_LIMITED, UNKNOWN_ADDRESS, Deferred, Delivered, Refused, Trouble, Verdict, bug

# An address that Zulip has taken mail for is good for so long, one that it does not know is bad for
# so long; one that may not be posted to only for a while, as that can be changed (seconds).
GOOD, BAD, NOT_ALLOWED = 30 * 86400.0, 86400.0, 60.0
# Zulip is asked so often in a second, and answers within so many seconds.
A_SECOND, PATIENCE = 5, 1.0
# A client waits after a question that was idle, twice as long after the next; some time after the
# last one it begins anew (seconds).
_FIRST_PAUSE, _LONGEST_PAUSE, _FORGIVEN = 0.5, 20.0, 300.0
# So many questions may be without an answer at a time.
_AT_A_TIME = 10
# A Zulip that does not say is not asked again for so long (seconds): mail is accepted meanwhile, for no
# more addresses than it would be asked for.
_SILENCE = 5.0
# So many addresses that Zulip does not know are remembered, and so many clients.
_MOST_BAD, _MOST_CLIENTS = 10_000, 1_000

# The causes of an answer that is none: the mail is to be accepted as if nobody asked; or it is
# to come back later.
NOT_TOLD, TOO_MANY = "not told", "too many questions"
_NOT_TOLD = Deferred("4.3.2", NOT_TOLD, "Zulip does not say whether it knows the address")
_TOO_MANY = Deferred("4.7.1", TOO_MANY, "too much mail for addresses that are not known yet; please try again later")


class Questions:
    """Asks on behalf of smtpd, for several threads.

    begin: starts a thread with this work, if it can. clock: seconds, monotonic.
    """

    def __init__(
        self, begin: Callable[[Callable[[], None]], bool], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._begin = begin
        self._clock = clock
        self._changed = Condition()
        self._asking: set[bytes] = set()
        self._asked: deque[float] = deque(maxlen=A_SECOND)
        # What Zulip has said of an address, and until when it is good enough.
        self._bad: OrderedDict[bytes, tuple[Refused, float]] = OrderedDict()
        # Until when an address is not asked for again, and until when none is.
        self._unanswered: OrderedDict[bytes, float] = OrderedDict()
        self._silent = 0.0
        # How many questions of a client were idle in a row, and until when it waits.
        self._clients: OrderedDict[str, tuple[int, float]] = OrderedDict()

    def verdict(self, address: Address, client: str, gateway: Gateway, journal: Journal) -> Verdict:
        """Delivered: Zulip knows the address; Refused: it does not; Deferred: see its cause.

        client: its IP address. journal: to read what is known. Raises Trouble.
        """
        key, client = address_of(address.token), network_of(client)
        end = self._clock() + PATIENCE
        with self._changed:
            if found := self._found(key, journal):
                return found
            if key not in self._asking:
                if self._clock() < self._unanswered.get(key, 0.0):
                    return _NOT_TOLD
                if not self._may_ask(client):
                    return _TOO_MANY
                if self._clock() < self._silent or len(self._asking) >= _AT_A_TIME:
                    return self._leave(key)
                self._asking.add(key)
                if not self._begin(lambda: self._ask(key, address, client, gateway)):
                    self._asking.discard(key)
                    return self._leave(key)
            while key in self._asking and (left := end - self._clock()) > 0:
                self._changed.wait(left)
            return self._found(key, journal) or _NOT_TOLD

    def _leave(self, key: bytes) -> Deferred:
        """Do not ask for an address for a while."""
        _remember(self._unanswered, key, self._clock() + _SILENCE, _MOST_CLIENTS)
        return _NOT_TOLD

    def _found(self, key: bytes, journal: Journal) -> Verdict | None:
        verdict, until = self._bad.get(key, (None, 0.0))
        if verdict is not None and self._clock() < until:
            return verdict
        return Delivered() if journal.known_since(key) > time.time() - GOOD else None

    def _may_ask(self, client: str) -> bool:
        now = self._clock()
        is_busy = len(self._asked) == A_SECOND and now - self._asked[0] < 1.0
        if is_busy or now < self._clients.get(client, (0, 0.0))[1]:
            return False
        self._asked.append(now)
        return True

    def _ask(self, key: bytes, address: Address, client: str, gateway: Gateway) -> None:
        was_asked = True
        try:
            verdict = gateway.knows(address)
        except Trouble as trouble:  # the rate limit, no turn, or trouble of our own
            verdict, was_asked = trouble.verdict, False
        except Exception as error:  # our own bug
            verdict, was_asked = bug(error), False
        with self._changed:
            if isinstance(verdict, Refused) and verdict.cause == UNKNOWN_ADDRESS:
                until = self._clock() + (BAD if verdict.status == "5.1.1" else NOT_ALLOWED)
                _remember(self._bad, key, (verdict, until), _MOST_BAD)
                idle, until = self._clients.get(client, (0, 0.0))
                idle = idle if self._clock() < until + _FORGIVEN else 0
                pause = min(_FIRST_PAUSE * 2.0**idle, _LONGEST_PAUSE)
                idle = min(idle + 1, 20)
                _remember(self._clients, client, (idle, self._clock() + pause), _MOST_CLIENTS)
            elif isinstance(verdict, Delivered):
                self._clients.pop(client, None)
            else:
                self._leave(key)
                # Zulip's own rate limit is the channel's alone.
                if was_asked and verdict.cause != RATE_LIMITED:
                    self._silent = self._clock() + _SILENCE
            self._asking.discard(key)
            self._changed.notify_all()


def network_of(client: str) -> str:
    """What stands for a client: its address, of IPv6 the /64 it has to itself."""
    try:
        address = ipaddress.ip_address(client)
    except ValueError:
        return client
    return client if address.version == 4 else str(ipaddress.ip_network((address, 64), strict=False))


def _remember(table: OrderedDict[Any, Any], key: Any, value: Any, most: int) -> None:
    table[key] = value
    table.move_to_end(key)
    if len(table) > most:
        table.popitem(last=False)
