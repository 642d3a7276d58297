"""What strangers, neighbours on the host and the network may try; what was found once, and what held.

What the tests of this scenario share.
"""

from __future__ import annotations

import json
import tempfile
from typing import Any

import testhosts
from conftest import ZulipHost
from figures import WIDE, limits

ETC, LIB = "/etc/zulip-email-gateway", "/usr/local/lib/zulip-email-gateway"
UNITS = "/etc/systemd/system/zulip-email-gateway"
KEY, CHAIN = "/etc/ssl/private/zulip.key", "/etc/ssl/certs/zulip.combined-chain.crt"
# Whoever else has a process on the host.
USERS = ("zulip", "www-data", "postfix", "zulip-email-gateway", "nobody")


def fresh(mx: ZulipHost, neighbour: ZulipHost, version: int) -> ZulipHost:
    """Nothing is left over."""
    mx.version = version
    mx.sh("postsuper -d ALL 2>/dev/null || true")
    limits(mx, WIDE)
    mx.neighbour = neighbour.container
    return mx


def outside(mx: ZulipHost, script: str, container: str = "") -> Any:
    """What a Python script prints (JSON) that runs outside; SERVER is the host."""
    with tempfile.TemporaryFile("w+") as file:
        file.write(f"SERVER = {mx.fqdn!r}\nimport json, smtplib, socket, ssl, time\n{script}")
        file.seek(0)
        return json.loads(
            testhosts.run(*testhosts.inside(container or f"{mx.prefix}-outside"), "python3", "-", stdin=file)
        )


def talk(mx: ZulipHost, *turns: bytes, first: bytes = b"EHLO client.example.org\r\n") -> list[str]:
    """Send each turn once the last one was answered; the answers, each as a whole."""
    return outside(
        mx,
        f"""
connection = socket.create_connection((SERVER, 25), 20); lines = connection.makefile("rb")
def answer():
    text = []
    while True:
        line = lines.readline().decode("latin-1")
        text.append(line.rstrip())
        if line[3:4] != "-":
            return " / ".join(text)
said = [answer()]
try:
    for turn in {[first, *turns]!r}:
        connection.sendall(turn); said.append(answer())
    connection.sendall(b"QUIT\\r\\n"); connection.shutdown(socket.SHUT_WR)
    said.append(lines.read().decode("latin-1"))
except OSError:
    pass
print(json.dumps(said[1:]))""",
    )  # fmt: skip


def envelope(recipient: str) -> tuple[bytes, bytes, bytes]:
    return (b"MAIL FROM:<user@sender.example.org>\r\n", f"RCPT TO:<{recipient}>\r\n".encode(), b"DATA\r\n")


def waiting(mx: ZulipHost) -> int:
    """How many mails for Zulip are in Postfix's queue."""
    return int(mx.sh(f'postqueue -j | grep -c \'"address": "[^"]*@{mx.domain}"\' || true'))


def doctor(mx: ZulipHost, status: int) -> str:
    done = mx.host.run("timeout 90 zulip-email-gateway doctor")
    assert done.rc == status, f"{done.rc}\n{done.stdout}\n{done.stderr}"
    return str(done.stdout + done.stderr)
