"""What systemd is told of a process (sd_notify(3)): one that hangs is killed, and started again."""

from __future__ import annotations

import os
import socket
from contextlib import suppress


def notify(state: str) -> None:
    """Tell systemd; nothing where it does not listen."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.sendto(state.encode(), address.replace("@", "\0", 1) if address[0] == "@" else address)


def watchdog_seconds() -> float | None:
    """How often to show that the process is alive, None if nobody asks (sd_watchdog_enabled(3))."""
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    return int(microseconds) / 3e6 if microseconds.isdecimal() else None


def expect(seconds: float) -> None:
    """The next step is done within that time. Nothing without a unit that has WatchdogSec=."""
    if "WATCHDOG_USEC" in os.environ:
        notify(f"WATCHDOG_USEC={seconds * 1e6:.0f}\nWATCHDOG=1")
