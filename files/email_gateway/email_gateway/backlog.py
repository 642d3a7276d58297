"""How much mail waits in Postfix's queue for each channel.

Postfix tells of each mail that it has accepted (policy.py), and brings it until its outcome is
final. What an operator has deleted from the queue, or what has expired there, is never brought
again: what should have been brought long before another one is gone (Journal.dequeue), and once
nothing was brought for a channel for longer than Postfix lets any mail wait, though mail for
others was, all of it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock

from .journal import Journal

# More than Postfix's maximal_backoff_time (seconds), which the role postfix_localmail sets.
STALE = 1200.0


class Backlog:
    """For several threads. clock: seconds, monotonic."""

    def __init__(self, journal: Journal, clock: Callable[[], float] = time.monotonic) -> None:
        self._journal = journal
        self._clock = clock
        self._lock = Lock()
        self._begun = clock()
        # How many mails for an address are being delivered, and when one was brought last.
        self._brought: dict[bytes, tuple[int, float]] = {}

    @contextmanager
    def brought(self, address: bytes) -> Iterator[None]:
        """Postfix brings a mail for it."""
        self._note(address, 1)
        try:
            yield
        finally:
            self._note(address, -1)

    def _note(self, address: bytes, change: int) -> None:
        with self._lock:
            number, _ = self._brought.get(address, (0, 0.0))
            self._brought[address] = number + change, self._clock()

    def is_full(self, address: bytes, most: int, reading: Journal) -> bool:
        """True if so many mails wait for it. reading: where to look first. Raises Trouble."""
        if reading.number_queued(address) < most:
            return False
        if self._is_idle(address):
            self._journal.forget_queued(address, time.time() - STALE)
        return self._journal.number_queued(address) >= most

    def _is_idle(self, address: bytes) -> bool:
        """Nothing was brought for it for longer than Postfix lets any mail wait."""
        with self._lock:
            number, last = self._brought.get(address, (0, self._begun))
        return number == 0 and self._clock() - last > STALE

    def tidy(self) -> None:
        """Forget what is gone from the queue, and the addresses that nothing is brought for any more."""
        with self._lock:
            is_bringing = any(last > self._clock() - STALE for _, last in self._brought.values())
        before = time.time() - STALE
        for address in self._journal.queued_before(before) if is_bringing else ():
            if self._is_idle(address):
                self._journal.forget_queued(address, before)
        with self._lock:
            old = self._clock() - 2 * STALE
            gone = [address for address, (number, last) in self._brought.items() if not number and last < old]
            for address in gone:
                del self._brought[address]
