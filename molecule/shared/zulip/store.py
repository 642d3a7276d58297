"""What the stand-in for Zulip keeps: channels, reply tokens, RabbitMQ's queue,
the limiter's record and the messages, in one SQLite file.

A test part. It answers as a real Zulip 6 to 10 was measured to answer, and is
never kinder: what Zulip drops, it drops.
"""

from __future__ import annotations

import json
import random
import re
import sqlite3
import sys
import time
from pathlib import Path
from typing import Any

HOME = Path("/var/lib/zulip-standin")
DATABASE = HOME / "zulip.sqlite"
# Knobs for tests: files that make things fail or slow.
KNOBS = Path("/run/zulip-standin")
DEPLOYMENT = Path("/home/zulip/deployments/current")
SETTINGS = Path("/etc/zulip/settings.py")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS channel (name TEXT PRIMARY KEY, slug TEXT, token TEXT UNIQUE);
CREATE TABLE IF NOT EXISTS reply (token TEXT PRIMARY KEY, channel TEXT, topic TEXT, user TEXT);
CREATE TABLE IF NOT EXISTS posts_as (channel TEXT, sender TEXT, token TEXT UNIQUE, PRIMARY KEY (channel, sender));
CREATE TABLE IF NOT EXISTS user (id INTEGER PRIMARY KEY, email TEXT UNIQUE, api_key TEXT, owner INTEGER);
CREATE TABLE IF NOT EXISTS private (channel TEXT PRIMARY KEY);
CREATE TABLE IF NOT EXISTS closed (channel TEXT PRIMARY KEY, why TEXT);
CREATE TABLE IF NOT EXISTS inactive (user TEXT PRIMARY KEY);
CREATE TABLE IF NOT EXISTS queue (id INTEGER PRIMARY KEY, rcpt_to TEXT, msg_base64 TEXT);
CREATE TABLE IF NOT EXISTS limiter (at REAL);
CREATE TABLE IF NOT EXISTS dropped (at REAL, why TEXT);
CREATE TABLE IF NOT EXISTS taken (id INTEGER PRIMARY KEY, rcpt_to TEXT, msg_base64 TEXT);
CREATE TABLE IF NOT EXISTS message (id INTEGER PRIMARY KEY, at REAL, channel TEXT, topic TEXT, sender TEXT,
    rcpt_to TEXT, mail_id TEXT, content TEXT);
"""


def connect() -> sqlite3.Connection:
    database = sqlite3.connect(DATABASE, timeout=30, isolation_level=None)
    database.row_factory = sqlite3.Row
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = NORMAL")
    database.executescript(_SCHEMA)
    return database


def settings() -> dict[str, Any]:
    """settings.py as Zulip reads it: once, when a process starts."""
    values: dict[str, Any] = {}
    # From the deployment's folder, where its own modules are.
    sys.path.insert(0, str(DEPLOYMENT))
    exec(compile(SETTINGS.read_bytes(), str(SETTINGS), "exec"), values)
    sys.path.remove(str(DEPLOYMENT))
    return values


def knob(name: str, otherwise: float) -> float:
    """The number in a knob's file; of two numbers any in between."""
    path = KNOBS / name
    numbers = path.read_text().split() if path.exists() else [str(otherwise)]
    return random.uniform(float(numbers[0]), float(numbers[-1]))


def version() -> tuple[int, int]:
    """Of the deployment, read once, when a process starts."""
    found = re.search(r'ZULIP_VERSION = "(\d+)\.(\d+)', (DEPLOYMENT / "version.py").read_text())
    assert found
    return int(found[1]), int(found[2])


STARTED = time.time()


def database_was_restarted() -> bool:
    """PostgreSQL was restarted since this process has started: its connection is of no use any more."""
    path = KNOBS / "database-restart"
    return path.exists() and path.stat().st_mtime > STARTED


class RedisDown(Exception):
    pass


def limited(database: sqlite3.Connection, rules: list[tuple[int, int]]) -> bool:
    """zerver/lib/rate_limiter.py: what is let through counts, what is not does not."""
    if (KNOBS / "redis-down").exists():
        raise RedisDown("Error 111 connecting to 127.0.0.1:6379. Connection refused.")
    now = time.time()
    for seconds, limit in rules:
        used = database.execute("SELECT count(*) FROM limiter WHERE at > ?", (now - seconds,)).fetchone()[0]
        if used >= limit:
            return True
    database.execute("INSERT INTO limiter VALUES (?)", (now,))
    database.execute("DELETE FROM limiter WHERE at < ?", (now - 7200,))
    return False


def rules(values: dict[str, Any]) -> list[tuple[int, int]]:
    """zproject/default_settings.py: (seconds, mails) for each organisation."""
    return list(values.get("RATE_LIMITING_MIRROR_REALM_RULES", [(60, 50), (300, 120), (3600, 600)]))


class ForwardError(Exception):
    """ZulipEmailForwardError."""


class NotAllowed(Exception):
    """JsonableError: the channel is archived, or who posts may not."""


def check_access(database: sqlite3.Connection, channel: str) -> None:
    """zerver/lib/email_mirror.py, check_access_for_channel_email_address."""
    row = database.execute("SELECT why FROM closed WHERE channel = ?", (channel,)).fetchone()
    if row is not None:
        raise NotAllowed(row["why"])


OPTIONS = {"show-sender", "include-footer", "include-quotes", "prefer-text", "prefer-html"}


def token_of(address: str, pattern: str) -> str:
    """zerver/lib/email_mirror_helpers.py: the part in the place of %s, then the token."""
    before, _, after = pattern.partition("%s")
    match = re.match(re.escape(before) + "(.*?)" + re.escape(after), address) if pattern else None
    if match is None:
        raise ForwardError("Address not recognized by gateway.")
    local = match[1]
    if re.fullmatch("mm[0-9a-f]{32}", local):
        return local
    parts = [part for part in local.replace(".", "+").split("+") if part not in OPTIONS]
    token = parts[0] if len(parts) == 1 else (parts[1] if parts else "")
    return "" if token.startswith("mm") else token  # a channel's never does


def find(database: sqlite3.Connection, address: str, pattern: str) -> sqlite3.Row:
    """The channel (with whom its mail is posted as) or reply that an address stands for; ForwardError otherwise."""
    token = token_of(address, pattern)
    if token.startswith("mm"):
        row: sqlite3.Row | None = database.execute("SELECT * FROM reply WHERE token = ?", (token,)).fetchone()
        if row is None:
            raise ForwardError("Zulip notification reply address is invalid.")
        return row
    row = database.execute(
        "SELECT name, 'Email Gateway' AS sender FROM channel WHERE token = ?1 "
        "UNION SELECT channel, sender FROM posts_as WHERE token = ?1",
        (token,),
    ).fetchone()
    if row is None:
        raise ForwardError(f"Bad stream token from email recipient {address}")
    return row


def state(database: sqlite3.Connection) -> dict[str, Any]:
    """Everything, for tests."""

    def rows(query: str) -> list[dict[str, object]]:
        return [dict(row) for row in database.execute(query)]

    return {
        "channels": rows("SELECT * FROM channel"),
        "replies": rows("SELECT * FROM reply"),
        "messages": rows("SELECT * FROM message ORDER BY id"),
        "dropped": rows("SELECT * FROM dropped"),
        "waiting": len(rows("SELECT id FROM queue")),
    }


def asked() -> None:
    """Note that somebody has handed a mail over, or has asked for an address."""
    with (KNOBS / "asked").open("a") as file:
        file.write(f"{time.time()}\n")


# Why an empty mail was dropped.
QUESTION = "nothing in it at all"


def drop(database: sqlite3.Connection, why: str) -> None:
    database.execute("INSERT INTO dropped VALUES (?, ?)", (time.time(), why))


if __name__ == "__main__":
    print(json.dumps(state(connect())))
