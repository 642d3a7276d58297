"""Ansible action: what a mail server says when the controller connects to it.

Never fails. Argument: C(host), a name or an address. Result: C(banner), its first line, or "" if there is none;
C(error), why there is none.
"""

from __future__ import annotations

import socket
from typing import Any

from ansible.plugins.action import ActionBase

PORT = 25
# Seconds to connect and as many for the banner: a server that looks up its client's name takes some.
LIFETIME = 10.0


class ActionModule(ActionBase):
    """The plugin."""

    _requires_connection = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        super().run(tmp, task_vars)
        _, arguments = self.validate_argument_spec({"host": {"type": "str", "required": True}})
        return banner_of(str(arguments["host"]))


def banner_of(host: str, port: int = PORT) -> dict[str, Any]:
    """What the action returns."""
    result: dict[str, Any] = {"changed": False, "banner": "", "error": ""}
    try:
        with socket.create_connection((host, port), LIFETIME) as connection, connection.makefile("rb") as lines:
            banner = lines.readline(512).decode("ascii", "replace").strip()
        return result | {"banner": banner, "error": "" if banner else "it closed the connection without a word"}
    except (OSError, UnicodeError) as error:
        what = "nobody answers" if isinstance(error, TimeoutError) else str(error)
        return result | {"error": what}
