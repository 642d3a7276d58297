"""Delivery in a process of its own, for a door that has no Postfix before it.

Killed between its request and the note of Zulip's answer, a program can not know
whether it has delivered, and a mail comes twice. So the service does not hand over
itself: a child does, which outlives a kill of the service and writes the answer down.
systemd starts the service again when the child has ended (systemd.kill(5), KillMode=).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from contextlib import suppress
from multiprocessing.connection import Connection

from .delivery import Envelope, Gateway
from .verdict import Deferred, Verdict, bug, overdue

# What is loaded already need not be loaded again for each mail.
_FORK = multiprocessing.get_context("fork")


def deliver_apart(gateway: Gateway, envelope: Envelope, message: bytes) -> Verdict:
    """As gateway.deliver; the inbox keeps what is refused."""
    answer, answers = _FORK.Pipe(duplex=False)
    child = _FORK.Process(target=_deliver, args=(answers, gateway, envelope, message))
    try:
        child.start()
    except OSError as error:
        # No memory, no room for another process: systemd starts the service anew.
        raise SystemExit(f"cannot start a process for the hand-over: {error.strerror}") from error
    answers.close()
    try:
        verdict: Verdict = answer.recv()
    except (EOFError, OSError):
        verdict = Deferred("4.3.0", "killed", "the process that handed the mail over was killed")
    child.join()
    return verdict


def _deliver(answers: Connection, gateway: Gateway, envelope: Envelope, message: bytes) -> None:
    gateway.parent = os.getppid()
    signal.signal(signal.SIGALRM, lambda *_: _give_up(answers, gateway))
    signal.alarm(gateway.deadline)
    try:
        verdict = gateway.deliver(envelope, message, keep_refused=False)
    except Exception as error:
        verdict = bug(error)
    signal.alarm(0)
    _answer(answers, verdict)


def _give_up(answers: Connection, gateway: Gateway) -> None:
    _answer(answers, overdue(gateway.deadline))
    os._exit(1)


def _answer(answers: Connection, verdict: Verdict) -> None:
    with suppress(BrokenPipeError):  # nobody is left to hear it; it is written down
        answers.send(verdict)
