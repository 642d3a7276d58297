"""Mail whose outcome Zulip's worker told only after its sender had been told that Zulip has it.

A copy stands in the quarantine until then. It goes when the mail was posted, and stays, with
the reason, when Zulip makes nothing of it: nobody else can be told. What failed for another
reason than the mail itself is handed over again, and what had nothing but quotations with the
option to keep them.
"""

from __future__ import annotations

import time

from . import outcome
from .addresses import redact
from .gateway import Envelope, Gateway, keeping_quotes
from .journal import REPLIES, Copy, Flight, Journal
from .verdict import NO_TEXT, RATE_LIMITED, Deferred, Delivered, Verdict
from .worker_log import POSTED, REPLY_POSTED

# Others wait for this one to end: seconds for Zulip's rate limit.
_MAX_WAIT = 5.0


def take_up(gateway: Gateway) -> tuple[list[str], Deferred | None]:
    """Deal with those whose outcome is known by now.

    Returns a line for each, and why others could not be handed over again now. Raises Trouble.
    """
    told: list[str] = []
    waits: Deferred | None = None
    limited = set[bytes]()
    for flight in gateway.outcomes.late():
        copy = gateway.journal.copy(flight.copy or "")
        verdict = outcome.verdict_of(flight)
        recipient = _again_to(gateway, flight, copy, verdict) if copy is not None else ""
        if copy is not None and recipient:
            # The rate limit has a place for others of the channel no more than for one; other trouble is
            # everybody's.
            if flight.address in limited or (waits is not None and waits.cause != RATE_LIMITED):
                continue
            verdict = _again(gateway, flight, copy, recipient)
            if isinstance(verdict, Deferred):
                waits = verdict
                limited.add(flight.address)
                continue
        _close(gateway, flight, verdict)
        if copy is not None:
            why = verdict.note if isinstance(verdict, Delivered) else verdict.reason
            told.append(f"mail of {copy.size} bytes for {redact(copy.recipient)}, accepted before: {why}")
    return told, waits


def _again_to(gateway: Gateway, flight: Flight, copy: Copy, verdict: Verdict) -> str:
    """Whom to hand it over to again; empty where that cannot help."""
    if isinstance(verdict, Deferred):
        return "" if flight.kind == outcome.LOST else copy.recipient
    if verdict.cause != NO_TEXT:
        return ""
    try:
        address = gateway.config.addresses.parse(copy.recipient)
    except ValueError:  # gateway.conf has another pattern by now
        return ""
    quoted = keeping_quotes(address, gateway.quarantine.message(copy.id, gateway.spool))
    return "" if quoted is None else quoted.text


def _again(gateway: Gateway, flight: Flight, copy: Copy, recipient: str) -> Verdict:
    envelope = Envelope(recipient, copy.sender, copy.queue_id, "zulip", ("late", copy.id, str(flight.id)))
    message = gateway.quarantine.message(copy.id, gateway.spool)
    return gateway.deliver(envelope, message, max_wait=_MAX_WAIT, keep_refused=False)


def _close(gateway: Gateway, flight: Flight, verdict: Verdict) -> None:
    with gateway.journal.change(sync=True) as database:
        Journal.told_late(database, flight.copy or "", verdict)
        if flight.kind in (POSTED, REPLY_POSTED):
            channel = REPLIES if flight.is_reply else flight.text
            Journal.add_posted(database, flight.key, flight.address, "", channel, flight.at or time.time())
        Journal.close_flight(database, flight)
    gateway.outcomes.forget(flight)
    if isinstance(verdict, Delivered):
        gateway.quarantine.remove(flight.copy or "")
