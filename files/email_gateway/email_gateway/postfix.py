"""The mail server that brings mail here."""

from __future__ import annotations

from pathlib import Path

MAIN_CF = Path("/etc/postfix/main.cf")
# Where mail comes in, from this host.
PORT_25 = "127.0.0.1", 25


def main_cf() -> str:
    """Its configuration, if the gateway has written it; else nothing."""
    try:
        text = MAIN_CF.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return text if "Zulip email gateway" in text else ""


def is_ours() -> bool:
    """True if the gateway has configured it."""
    return bool(main_cf())
