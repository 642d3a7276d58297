"""systemd's watchdog (sd_notify(3)): a process that hangs is killed, and started again."""

from __future__ import annotations

import os
import socket
from contextlib import suppress


def expect(seconds: float) -> None:
    """The next step is done within that time. Nothing without a unit that has WatchdogSec=."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address or "WATCHDOG_USEC" not in os.environ:
        return
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as told:
        told.connect(address.replace("@", "\0", 1) if address.startswith("@") else address)
        told.send(b"WATCHDOG_USEC=%d\nWATCHDOG=1" % (seconds * 1e6))
