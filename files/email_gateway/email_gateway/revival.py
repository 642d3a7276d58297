"""Zulip 11's mail server that has lost its database.

After a restart of PostgreSQL it answers 500 to everything, for ever: a management command
never renews its database connection (measured). It tells an address that cannot exist
from others by asking its database, so that 500 there means that it needs a restart. root's path
unit does that when this file is written (zulip-email-gateway-server.path); the service itself
has no rights.
"""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

from . import files
from .backend import prove
from .gateway import Gateway
from .journal import add_to_count
from .submission import SOCKET
from .verdict import Deferred

# Whoever may write here may have Zulip's mail server restarted.
REQUEST = Path(SOCKET).with_name("restart-server")
# Not more often than this (seconds): PostgreSQL may be down for long.
_PAUSE = 300.0
# What is counted of it.
RESTARTED = "zulip's mail server restarted"


def revive(gateway: Gateway, request: Path = REQUEST) -> bool:
    """Ask for a restart of Zulip's mail server if nothing else helps; whether that was done.

    Raises Trouble.
    """
    backend, journal = gateway.backend(), gateway.journal
    now = time.time()
    last: float = journal.note(RESTARTED) or 0.0
    if not backend.said_500 or last <= now < last + _PAUSE:
        return False
    backend.said_500 = False
    verdict = prove(backend, gateway.config, gateway.spool)
    if not isinstance(verdict, Deferred) or verdict.cause != "SMTP 500":
        return False
    with suppress(OSError):  # without our path unit there is nobody to ask
        files.write(request, [b"\n"])
        with journal.change() as database:
            journal.write_note(database, RESTARTED, now)
            add_to_count(database, RESTARTED, "500")
        return True
    return False
