"""Takes over what earlier versions of the gateway have left: done once, then it is gone.

They had state.json (the use of the rate limit, counters, what an inbox still has though
Zulip has it), recovery.json (how far Zulip's file of failed mail was read) and two files
for each mail in quarantine, ID.eml and ID.json.
"""

from __future__ import annotations

import json
import sqlite3
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from . import files
from .gateway import Gateway
from .journal import FAILED_INSIDE, POSITION, Copy, Journal, Mail, add_to_count, key_of
from .message import Message
from .quarantine import FOLDER
from .verdict import Trouble

_STATE, _RECOVERY = "state.json", "recovery.json"
_LOCKS = ("state.lock", "recovery.lock")


def run(folder: Path, gateway: Gateway) -> None:
    """Take over what there is in `folder`, the state of the gateway; raises Trouble."""
    try:
        _quarantine(folder / FOLDER, gateway)
        state, recovery = _read(folder / _STATE), _read(folder / _RECOVERY)
        if state or recovery:
            with gateway.journal.change(sync=True) as database:
                _state(state, gateway.journal, database)
                _recovery(recovery.get("recovery"), gateway.journal, database, folder)
        for name in (_STATE, _RECOVERY, *_LOCKS):
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise Trouble("4.3.0", "journal", f"cannot take over what is in {folder}: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    """The file's object; empty if there is none, or nothing sensible in it."""
    with suppress(FileNotFoundError, ValueError):
        found = json.loads(path.read_bytes())
        return found if isinstance(found, dict) else {}
    return {}


def _state(state: dict[str, Any], journal: Journal, database: sqlite3.Connection) -> None:
    try:
        slots = [
            # What is not known to be consumed will have been by now.
            (float(slot["opened"]), time.time() if slot["consumed"] is None else float(slot["consumed"]))
            for slot in state["slots"]
        ]
        counts = [
            (outcome, cause, int(number))
            for outcome, causes in state["counts"].items()
            for cause, number in causes.items()
        ]
        since = float(state["since"])
        accepted = [(str(inbox), str(int(uid))) for inbox, uid in state.get("accepted", [])]
    except (KeyError, TypeError, ValueError, AttributeError):
        return  # damaged: the new journal says that it knows nothing
    database.executemany("INSERT INTO unit (opened, consumed) VALUES (?, ?)", slots)
    for outcome, cause, number in counts:
        add_to_count(database, outcome, cause, number, int(since // 3600))
    for inbox, uid in accepted:
        mail = Mail(key_of("inbox", inbox, uid, b""), "inbox", "", "", "", 0)
        journal.begin(database, mail)
        database.execute("UPDATE mail SET state = 'delivered' WHERE key = ?", (mail.key,))
    journal.write_note(database, "since", since)
    if "damaged" not in state:
        journal.write_note(database, "consumption unknown", None)
    if isinstance(state.get("endpoint"), str):
        journal.write_note(database, "endpoint", state["endpoint"])


def _recovery(recovery: Any, journal: Journal, database: sqlite3.Connection, folder: Path) -> None:
    with suppress(KeyError, TypeError, ValueError, AttributeError):
        position = {"inode": int(recovery["inode"]), "offset": int(recovery["offset"]), "generation": 0}
        for mark in recovery["again"]:
            mail = Mail(key_of("zulip", "recovery.json", str(mark)), "zulip", "", "", str(mark), 0)
            journal.begin(database, mail)
            database.execute("UPDATE mail SET state = 'delivered' WHERE key = ?", (mail.key,))
        for outcome, number in recovery["counts"].items():
            add_to_count(database, FAILED_INSIDE, outcome, int(number))
        files.write(folder / POSITION, [json.dumps(position).encode()])


def _quarantine(folder: Path, gateway: Gateway) -> None:
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        message = path.with_suffix(".eml")
        if message.exists():
            try:
                copy = Copy(**{"lost": False, **json.loads(path.read_bytes())})
            except (ValueError, TypeError):
                status = message.stat()
                why = "its description was damaged"
                copy = Copy(path.stem, "", "", "", why, status.st_mtime, status.st_size, lost=False)
            with open(message, "rb") as file:
                gateway.quarantine.write(copy, Message(file).pieces())
        message.unlink(missing_ok=True)
        path.unlink()
