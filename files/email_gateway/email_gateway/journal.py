"""The journal: one SQLite file with the key, the state and the outcome of every mail.

Everything else is derived from it: what an inbox still has though Zulip has it, the use
of Zulip's rate limits, the counters, the index of the quarantine. Only the service
writes. A commit survives the end of the program; one that must survive a power cut as
well is synced. A damaged file is moved aside, and a new one knows nothing (its notes
"consumption unknown", see pace.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Any, NamedTuple

from . import files
from .addresses import redact
from .verdict import WAITING, Deferred, Delivered, Refused, Trouble, Verdict

NAME = "journal.sqlite"
DAMAGED = ".damaged-"
# How far Zulip's file of failed mail was read (failures.py). It stands beside the journal,
# and where it does, a journal that is new has taken the place of one that was lost.
POSITION = "failures-position.json"
# What is counted of mail that Zulip had accepted and failed to post.
FAILED_INSIDE = "failed inside zulip"
# What is counted of all mail that comes, by its source, and of mail that was not accepted (policy.py).
ACCEPTED = "accepted"
REJECTED = "rejected"
# Where Postfix sends what tells that a bounce could not be delivered (main.cf), and what it is counted as.
UNDELIVERABLE = "undeliverable@gateway.invalid"
# Single mails are forgotten this long (seconds) after they were last heard of. Postfix's
# queue has no mail any longer by then (maximal_queue_lifetime).
RETENTION = 14 * 86400
# Zulip writes a mail that it failed with into its file at once (seconds, with much to spare).
_EXPECTED = 3600
# Postfix brings a mail for so long (seconds; maximal_queue_lifetime).
_BROUGHT_AGAIN = 5 * 86400
# So many mails at a time: nobody is to wait for it.
_AT_ONCE = 1000
# Counts are kept by the hour for this time (seconds), and then only their sum, as hour 0.
_COUNTED = 90 * 86400
# From acceptance to posted: up to so many seconds.
BOUNDS = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0, 14400.0, 86400.0, float("inf"))
# What replies are counted as, which have no channel, and mail whose channel Zulip has not told.
REPLIES, NO_CHANNEL = "(replies)", "(not known)"

# mail: source is postfix, inbox, zulip (a mail that failed there: queue_id is then what it is
# known by) or operator; recipient is shortened unless there is a copy to deliver again; copy
# is a file of the quarantine; tries: how often Zulip has failed with it; content: see Mail.
# unit: a place in Zulip's rate limit, see Unit. count: outcomes by the hour. note: the rest.
# flight: mail that Zulip has and whose outcome is not known, see Flight. known: addresses that Zulip
# knew the last time; name is what it calls the channel, where it has said so. failure: mail in
# Zulip's file of failed mail that is taken care of. queued: mail in Postfix's queue, by recipient; at: when it was
# brought last. posted, delay: mails by hour, by channel and by how long each took, see BOUNDS.
# Each version of the journal adds to the one before.
_SCHEMA = (
    """
CREATE TABLE mail (
    id INTEGER PRIMARY KEY, key BLOB UNIQUE, source TEXT NOT NULL, recipient TEXT NOT NULL, sender TEXT NOT NULL,
    queue_id TEXT NOT NULL, size INTEGER NOT NULL, state TEXT NOT NULL, status TEXT NOT NULL DEFAULT '',
    cause TEXT NOT NULL DEFAULT '', reason TEXT NOT NULL DEFAULT '', received REAL NOT NULL, changed REAL NOT NULL,
    copy TEXT UNIQUE, lost INTEGER NOT NULL DEFAULT 0);
CREATE INDEX mail_changed ON mail (changed) WHERE copy IS NULL;
CREATE INDEX mail_copy ON mail (lost, changed, size) WHERE copy IS NOT NULL;
CREATE INDEX mail_failed ON mail (queue_id) WHERE source = 'zulip';
CREATE TABLE unit (
    id INTEGER PRIMARY KEY, opened REAL NOT NULL, handed REAL, consumed REAL, doubt INTEGER NOT NULL DEFAULT 0);
CREATE TABLE count (hour INTEGER, outcome TEXT, cause TEXT, number INTEGER, PRIMARY KEY (hour, outcome, cause))
    WITHOUT ROWID;
CREATE TABLE note (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
""",
    """
UPDATE unit SET consumed = handed, doubt = 0 WHERE consumed IS NULL;
DELETE FROM unit WHERE consumed IS NULL;
ALTER TABLE unit DROP COLUMN handed;
DELETE FROM note WHERE name IN ('feared', 'lost');
ALTER TABLE mail ADD COLUMN tries INTEGER NOT NULL DEFAULT 0;
CREATE TABLE flight (
    id INTEGER PRIMARY KEY, key BLOB UNIQUE NOT NULL, address BLOB NOT NULL, is_reply INTEGER NOT NULL,
    unit INTEGER, begun REAL NOT NULL, handed REAL, failed REAL, copy TEXT, kind TEXT NOT NULL DEFAULT '',
    text TEXT NOT NULL DEFAULT '', at REAL);
CREATE TABLE place (address BLOB PRIMARY KEY, name TEXT NOT NULL, changed REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE failure (id INTEGER PRIMARY KEY, address BLOB NOT NULL, at REAL NOT NULL);
""",
    """
ALTER TABLE unit ADD COLUMN address BLOB;
DROP TABLE place;
DELETE FROM failure;
CREATE TABLE known (address BLOB PRIMARY KEY, name TEXT NOT NULL, changed REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE queued (address BLOB, queue_id TEXT, at REAL NOT NULL, PRIMARY KEY (address, queue_id)) WITHOUT ROWID;
""",
    """
ALTER TABLE mail ADD COLUMN content BLOB;
CREATE INDEX mail_content ON mail (content) WHERE content IS NOT NULL;
""",
    """
ALTER TABLE queued ADD COLUMN accepted REAL;
UPDATE queued SET accepted = at;
CREATE TABLE posted (hour INTEGER, channel TEXT, number INTEGER, PRIMARY KEY (hour, channel)) WITHOUT ROWID;
CREATE TABLE delay (hour INTEGER, bound REAL, number INTEGER, seconds REAL, PRIMARY KEY (hour, bound)) WITHOUT ROWID;
""",
)
_COPIES = (
    "SELECT copy, recipient, sender, queue_id, reason, changed, size, lost, state FROM mail WHERE copy IS NOT NULL"
)


@dataclass
class Unit:
    """A place in Zulip's rate limit, in Unix seconds of the host's clock, as Zulip's limiter.

    opened: when it was taken; consumed: when Zulip counted the mail, None while that is not
    known; doubt: there was no answer; address: of the channel, see address_of (None: not known).
    """

    id: int
    opened: float
    consumed: float | None = None
    doubt: bool = False
    address: bytes | None = None


class Ticket(NamedTuple):
    """A unit that was taken: in which journal, and its id there."""

    journal: int
    unit: int


@dataclass
class Flight:
    """A mail that is with Zulip; times in Unix seconds.

    key: the mail's; address: of its recipient, see address_of; unit: its place in the rate limit
    (None: a reply); begun: when the hand-over was begun; handed: when Zulip had accepted it; failed:
    when Zulip's worker failed with it, which RabbitMQ may give it once more; copy: in the
    quarantine, once nobody waits for the outcome (empty: no mail, but a question); kind, text, at:
    the outcome, as a line of the worker's log has it (worker_log.Line); kind is empty until then.
    """

    id: int
    key: bytes
    address: bytes
    is_reply: bool
    unit: Ticket | None
    begun: float
    handed: float | None = None
    failed: float | None = None
    copy: str | None = None
    kind: str = ""
    text: str = ""
    at: float | None = None

    @property
    def is_question(self) -> bool:
        """True where Zulip was only asked for the address (questions.py)."""
        return self.copy == ""


class Mail(NamedTuple):
    """What is known of a mail besides its text. key: the same for the same mail. content: the same for
    all copies that an inbox has of a mail to one address; None where that is not known."""

    key: bytes
    source: str
    recipient: str
    sender: str
    queue_id: str
    size: int
    content: bytes | None = None


class Copy(NamedTuple):
    """A mail in quarantine. refused: Unix seconds; size: bytes of the message; lost: Zulip
    had accepted it, so nobody was told, and it stays until it is delivered; waits: it may have
    been, Zulip has not said."""

    id: str
    recipient: str
    sender: str
    queue_id: str
    reason: str
    refused: float
    size: int
    lost: bool
    waits: bool = False


def key_of(*parts: str | bytes) -> bytes:
    """The key of a mail that is known by these parts."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        encoded = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return digest.digest()


def address_of(token: str) -> bytes:
    """By this a channel or a conversation is known, without giving its address away."""
    return key_of("address", token)


def disk_space(size: int) -> int:
    """What a copy takes on the disk, for a message of so many bytes: blocks, envelope, and its row here."""
    block, envelope, row = 4096, 512, 512
    return (size + envelope + block - 1) // block * block + row


class Journal:
    """Access to the journal in `folder`, for several threads; every fault is raised as Trouble.

    create: False to read what there is, as other processes do; Trouble if there is none.
    """

    def __init__(self, folder: Path, create: bool = True) -> None:
        self._path = folder / NAME
        self._create = create
        self._lock = RLock()
        self._database: sqlite3.Connection | None = None
        self._inode = 0
        # Of the journals that have stood here, one after the other.
        self._generation = 0
        self._began_anew = False

    def began_anew(self) -> bool:
        """True once after there was none, or it was lost: it knows no copies in quarantine."""
        began, self._began_anew = self._began_anew, False
        return began

    @contextmanager
    def change(self, sync: bool = False) -> Iterator[sqlite3.Connection]:
        """One transaction, on the disk afterwards where `sync` asks for it."""
        with self._lock, self._trouble():
            database = self._open()
            database.execute(f"PRAGMA synchronous = {'FULL' if sync else 'NORMAL'}")
            database.execute("BEGIN IMMEDIATE")
            try:
                yield database
                database.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):
                    database.execute("ROLLBACK")
                raise

    @contextmanager
    def _look(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._trouble():
            yield self._open()

    def is_free(self, seconds: float) -> bool:
        """True unless a thread keeps it for longer than that."""
        free = self._lock.acquire(timeout=seconds)
        if free:
            self._lock.release()
        return free

    def close(self) -> None:
        """Write everything into the one file, for a clean end."""
        with self._lock:
            if self._database is not None:
                with suppress(sqlite3.Error):
                    self._database.close()
            self._database = None

    # --- Single mails

    def verdict(self, key: bytes) -> Verdict | None:
        """What has become of a mail, if that is final."""
        with self._look() as database:
            query = "SELECT state, status, cause, reason, changed FROM mail WHERE key = ?"
            row = database.execute(query, (key,)).fetchone()
        if row is None or row[0] not in ("delivered", "waiting", "refused"):
            return None
        self._remember(key, row[4])
        return Refused(*row[1:4]) if row[0] == "refused" else Delivered("accepted by Zulip before", row[2])

    def last_mail(self) -> int:
        """The number of the mail that was heard of last."""
        with self._look() as database:
            return int(database.execute("SELECT coalesce(max(id), 0) FROM mail").fetchone()[0])

    def mail_of(self, queue_id: str, after: int) -> tuple[str, str, str]:
        """State, cause and reason of a mail of Postfix's with this queue ID, which comes again, heard of after the
        mail with that number; empty if there is none."""
        query = "SELECT state, cause, reason FROM mail WHERE id > ? AND queue_id = ? AND source = 'postfix'"
        with self._look() as database:
            row = database.execute(query, (after, queue_id)).fetchone()
        return ("", "", "") if row is None else (row[0], row[1], row[2])

    def _remember(self, key: bytes, changed: float) -> None:
        """What is asked for is not forgotten (tidy)."""
        if changed < time.time() - RETENTION / 2:
            with self.change() as database:
                database.execute("UPDATE mail SET changed = ? WHERE key = ?", (time.time(), key))

    def delivered(self, keys: Iterable[bytes]) -> list[bool]:
        """Which of these mails Zulip has accepted. They are remembered on while they are asked for."""
        states = []
        for key in keys:
            with self._look() as database:
                row = database.execute("SELECT state, changed FROM mail WHERE key = ?", (key,)).fetchone()
            states.append(row is not None and row[0] in ("delivered", "waiting"))
            if row is not None:
                self._remember(key, row[1])
        return states

    def has_posted(self, content: bytes) -> bool:
        """True if Zulip has accepted a copy of this mail."""
        query = "SELECT 1 FROM mail WHERE content = ? AND state IN ('delivered', 'waiting')"
        with self._look() as database:
            return database.execute(query, (content,)).fetchone() is not None

    def fails_alone(self, key: bytes) -> int:
        """How often Zulip has failed with a mail, if it has posted a later one since the last time; else 0."""
        query = (
            "SELECT tries FROM mail WHERE key = ?1 AND EXISTS (SELECT 1 FROM mail AS other"
            " WHERE other.state = 'delivered' AND other.cause = 'posted'"
            " AND other.copy IS NULL AND other.received > mail.received AND other.changed > mail.changed)"
        )
        with self._look() as database:
            row = database.execute(query, (key,)).fetchone()
        return 0 if row is None else int(row[0])

    def was_handed_over_again(self, mark: str) -> bool:
        """True for a mail that failed inside Zulip and was accepted there once more."""
        with self._look() as database:
            query = "SELECT 1 FROM mail WHERE source = 'zulip' AND queue_id = ? AND state IN ('delivered', 'waiting')"
            return database.execute(query, (mark,)).fetchone() is not None

    @staticmethod
    def begin(database: sqlite3.Connection, mail: Mail) -> None:
        """Note that a mail is about to be handed over."""
        now = time.time()
        _count_new(database, mail)
        database.execute(
            "INSERT INTO mail (key, source, recipient, sender, queue_id, size, content, state, received, changed)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, 'open', ?, ?) ON CONFLICT (key) DO UPDATE SET state = 'open', changed = ?",
            (*mail._replace(recipient=redact(mail.recipient)), now, now, now),
        )

    @staticmethod
    def finish(
        database: sqlite3.Connection, mail: Mail, verdict: Verdict, copy: str | None = None, lost: bool = False
    ) -> None:
        """Note what became of a mail, and count it, once that is known. copy: its file in the quarantine."""
        now = time.time()
        outcome, cause = type(verdict).__name__.lower(), verdict.cause
        state = WAITING if cause == WAITING else outcome
        status, reason = ("", verdict.note) if isinstance(verdict, Delivered) else (verdict.status, verdict.reason)
        recipient = redact(mail.recipient) if copy is None else mail.recipient
        _count_new(database, mail)
        database.execute(
            "INSERT INTO mail (key, source, recipient, sender, queue_id, size, content, state, status, cause, reason,"
            " received, changed, copy, lost) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
            " ON CONFLICT (key) DO UPDATE SET"
            " recipient = excluded.recipient, state = excluded.state, status = excluded.status,"
            " cause = excluded.cause, reason = excluded.reason, changed = excluded.changed, copy = excluded.copy,"
            " lost = excluded.lost",
            (*mail._replace(recipient=recipient), state, status, cause, reason, now, now, copy, lost),
        )
        if isinstance(verdict, Deferred) and verdict.counted:
            database.execute("UPDATE mail SET tries = tries + 1 WHERE key = ?", (mail.key,))
        if state == outcome:
            add_to_count(database, outcome, cause)

    @staticmethod
    def told_late(database: sqlite3.Connection, copy: str, verdict: Verdict) -> None:
        """Note what became of a mail of which there is this copy, and count it."""
        is_good = isinstance(verdict, Delivered)
        status, reason = ("", verdict.note) if isinstance(verdict, Delivered) else ("5.3.0", verdict.reason)
        database.execute(
            "UPDATE mail SET state = ?, status = ?, cause = ?, reason = ?, changed = ? WHERE copy = ?",
            ("delivered" if is_good else "refused", status, verdict.cause, reason, time.time(), copy),
        )
        if verdict.cause != WAITING:
            add_to_count(database, *(("delivered", verdict.cause) if is_good else (FAILED_INSIDE, "quarantined")))

    # --- Counters, and what else is to be remembered

    @staticmethod
    def add_posted(
        database: sqlite3.Connection, key: bytes, address: bytes, queue_id: str, channel: str, at: float
    ) -> None:
        """Count a mail that was posted at that time (Unix seconds), by its channel and by how long it took."""
        query = (
            "SELECT accepted FROM queued WHERE address = ? AND queue_id = ? UNION ALL SELECT received FROM mail"
            " WHERE key = ? LIMIT 1"
        )
        row = database.execute(query, (address, queue_id, key)).fetchone()
        seconds = 0.0 if row is None else max(0.0, at - row[0])
        hour, bound = int(at // 3600), next(bound for bound in BOUNDS if seconds <= bound)
        add = "ON CONFLICT DO UPDATE SET number = number + 1"
        database.execute(f"INSERT INTO posted VALUES (?, ?, 1) {add}", (hour, channel or NO_CHANNEL))
        query = f"INSERT INTO delay VALUES (?, ?, 1, ?) {add}, seconds = seconds + excluded.seconds"
        database.execute(query, (hour, bound, seconds))
        Journal.write_note(database, "last posted", at)

    def posted(self) -> dict[str, int]:
        """How many mails were posted, by channel."""
        with self._look() as database:
            return dict(database.execute("SELECT channel, sum(number) FROM posted GROUP BY channel"))

    def delays(self) -> tuple[dict[float, int], float]:
        """How many mails took up to so many seconds and more than the bound before (BOUNDS), and all together."""
        with self._look() as database:
            found = dict(database.execute("SELECT bound, sum(number) FROM delay GROUP BY bound"))
            seconds = database.execute("SELECT total(seconds) FROM delay").fetchone()[0]
        return {bound: int(found.get(bound, 0)) for bound in BOUNDS}, float(seconds)

    def refusals(self, now: float) -> tuple[int, float]:
        """How many mails were refused in this hour and the one before, and in as long in the week before that, or
        since the journal began."""
        this = int(now // 3600)
        hours = min(168.0, max(2.0, this - 1 - (self.note("since") or 0.0) / 3600))
        query = "SELECT total(number) FROM count WHERE outcome = 'refused' AND hour BETWEEN ? AND ?"
        with self._look() as database:
            number = database.execute(query, (this - 1, this)).fetchone()[0]
            usual = database.execute(query, (this - 169, this - 2)).fetchone()[0]
        return int(number), 2 * usual / hours

    def waits_since(self) -> float | None:
        """When Postfix has accepted the oldest mail that it still has for a channel (Unix seconds)."""
        with self._look() as database:
            row = database.execute("SELECT min(accepted) FROM queued").fetchone()
        return None if row[0] is None else float(row[0])

    def queued(self) -> dict[str, int]:
        """How many mails wait in Postfix's queue, by channel."""
        query = (
            "SELECT CASE coalesce(known.name, '') WHEN '' THEN ? ELSE known.name END AS channel, count(*) FROM queued"
            " LEFT JOIN known USING (address) GROUP BY channel"
        )
        with self._look() as database:
            return dict(database.execute(query, (NO_CHANNEL,)))

    def counts(self) -> dict[str, dict[str, int]]:
        """How often each outcome was reached, by cause."""
        found: dict[str, dict[str, int]] = {}
        query = "SELECT outcome, cause, sum(number) FROM count WHERE outcome != ? GROUP BY outcome, cause"
        with self._look() as database:
            for outcome, cause, number in database.execute(query, (ACCEPTED,)):
                found.setdefault(outcome, {})[cause] = number
        return found

    def history(self, since: float) -> dict[str, list[tuple[Any, ...]]]:
        """What was counted from that time on (Unix seconds), by hours (Unix seconds / 3600): outcomes with their
        causes, mails posted by channel, and delays by their bound (None: the last) with the sum of their seconds."""
        queries = {
            "outcomes": "SELECT hour, outcome, cause, number FROM count WHERE hour >= ? ORDER BY hour",
            "posted": "SELECT hour, channel, number FROM posted WHERE hour >= ? ORDER BY hour",
            "delays": "SELECT hour, nullif(bound, 9e999), number, seconds FROM delay WHERE hour >= ? ORDER BY hour",
        }
        first = max(1, int(since // 3600))
        with self._look() as database:
            return {what: database.execute(query, (first,)).fetchall() for what, query in queries.items()}

    def accepted(self) -> dict[str, int]:
        """How many mails came, by source."""
        with self._look() as database:
            query = "SELECT cause, sum(number) FROM count WHERE outcome = ? GROUP BY cause"
            return dict(database.execute(query, (ACCEPTED,)))

    def note(self, name: str) -> Any:
        """What was written down under this name, None if nothing was."""
        with self._look() as database:
            row = database.execute("SELECT value FROM note WHERE name = ?", (name,)).fetchone()
        return None if row is None else json.loads(row[0])

    @staticmethod
    def write_note(database: sqlite3.Connection, name: str, value: Any) -> None:
        """Write a value down under this name; None removes it."""
        if value is None:
            database.execute("DELETE FROM note WHERE name = ?", (name,))
        else:
            database.execute("INSERT OR REPLACE INTO note VALUES (?, ?)", (name, json.dumps(value)))

    # --- Zulip's rate limit

    def units(self, since: float) -> list[Unit]:
        """The units that were not consumed before that time, oldest first."""
        with self._look() as database:
            rows = database.execute(
                "SELECT id, opened, consumed, doubt, address FROM unit WHERE consumed IS NULL OR consumed > ?"
                " ORDER BY id",
                (since,),
            )
            return [Unit(row[0], row[1], row[2], bool(row[3]), row[4]) for row in rows]

    def open_unit(self, database: sqlite3.Connection, now: float, address: bytes | None = None) -> Ticket:
        """Take a unit for mail to this address."""
        number = database.execute("INSERT INTO unit (opened, address) VALUES (?, ?)", (now, address)).lastrowid
        return Ticket(self._generation, int(number or 0))

    def has_issued(self, ticket: Ticket) -> bool:
        """False where another journal has taken the place of the one that the unit stood in."""
        return ticket.journal == self._generation

    @staticmethod
    def add_consumed(database: sqlite3.Connection, times: Iterable[float]) -> None:
        """Note what Zulip has counted without us, or before we knew."""
        database.executemany("INSERT INTO unit (opened, consumed) VALUES (?1, ?1)", ((at,) for at in times))

    @staticmethod
    def save_units(database: sqlite3.Connection, units: Iterable[Unit]) -> None:
        """Write back what is known of units by now."""
        database.executemany(
            "UPDATE unit SET opened = ?, consumed = ?, doubt = ? WHERE id = ?",
            ((unit.opened, unit.consumed, unit.doubt, unit.id) for unit in units),
        )

    def settle_unit(self, database: sqlite3.Connection, ticket: Ticket, at: float | None) -> None:
        """Zulip has counted the mail at that time (Unix seconds), or not at all."""
        if not self.has_issued(ticket):  # it was lost meanwhile, and the unit with it
            self.add_consumed(database, [] if at is None else [at])
        elif at is None:
            self.remove_unit(database, ticket.unit)
        else:
            database.execute("UPDATE unit SET consumed = ? WHERE id = ?", (at, ticket.unit))

    @staticmethod
    def add_another(database: sqlite3.Connection, at: float) -> None:
        """Zulip has counted a mail of another producer, or one that was in doubt, at that time."""
        query = "UPDATE unit SET consumed = ?, doubt = 0 WHERE id = (SELECT min(id) FROM unit WHERE doubt = 1)"
        if not database.execute(query, (at,)).rowcount:
            database.execute("INSERT INTO unit (opened, consumed) VALUES (?1, ?1)", (at,))

    @staticmethod
    def remove_unit(database: sqlite3.Connection, number: int) -> None:
        """Give a unit back: Zulip has surely not counted the mail."""
        database.execute("DELETE FROM unit WHERE id = ?", (number,))

    # --- Mail that is with Zulip

    @staticmethod
    def open_flight(
        database: sqlite3.Connection,
        key: bytes,
        address: bytes,
        is_reply: bool,
        unit: Ticket | None,
        copy: str | None,
    ) -> Flight:
        """Note that a mail is about to be handed over."""
        now = time.time()
        database.execute("DELETE FROM flight WHERE key = ?", (key,))
        number = database.execute(
            "INSERT INTO flight (key, address, is_reply, unit, begun, copy) VALUES (?, ?, ?, ?, ?, ?)",
            (key, address, is_reply, None if unit is None else unit.unit, now, copy),
        ).lastrowid
        return Flight(int(number or 0), key, address, is_reply, unit, now, copy=copy)

    @staticmethod
    def save_flight(database: sqlite3.Connection, flight: Flight) -> None:
        """Write back what is known of it by now."""
        database.execute(
            "UPDATE flight SET handed = ?, failed = ?, copy = ?, kind = ?, text = ?, at = ? WHERE key = ?",
            (flight.handed, flight.failed, flight.copy, flight.kind, flight.text, flight.at, flight.key),
        )

    def keep_flight(self, database: sqlite3.Connection, flight: Flight) -> None:
        """Write all that is known of it, also into a journal that is newer; its unit stands in the former one."""
        unit = flight.unit.unit if flight.unit is not None and flight.unit.journal == self._generation else None
        is_reply, begun = flight.is_reply, flight.begun
        database.execute(
            "INSERT INTO flight (key, address, is_reply, unit, begun, copy) VALUES (?, ?, ?, ?, ?, ?)"
            " ON CONFLICT (key) DO NOTHING",
            (flight.key, flight.address, is_reply, unit, begun, flight.copy),
        )
        self.save_flight(database, flight)

    @staticmethod
    def close_flight(database: sqlite3.Connection, flight: Flight) -> None:
        """Its outcome is dealt with."""
        database.execute("DELETE FROM flight WHERE key = ?", (flight.key,))

    def flights(self) -> list[Flight]:
        """All that are under way, in the order of their hand-over."""
        with self._look() as database:
            rows = database.execute(
                "SELECT id, key, address, is_reply, unit, begun, handed, failed, copy, kind, text, at FROM flight"
                " ORDER BY id"
            )
            return [_flight(row, self._generation) for row in rows]

    @staticmethod
    def learn(database: sqlite3.Connection, address: bytes, name: str = "") -> None:
        """Zulip knows this address; it calls the channel by that name, or does not say."""
        database.execute(
            "INSERT INTO known VALUES (?, ?, ?) ON CONFLICT (address) DO UPDATE SET changed = excluded.changed,"
            " name = CASE excluded.name WHEN '' THEN name ELSE excluded.name END",
            (address, name, time.time()),
        )

    @staticmethod
    def unlearn(database: sqlite3.Connection, address: bytes) -> None:
        """Zulip does not know this address any more."""
        database.execute("DELETE FROM known WHERE address = ?", (address,))

    def known_since(self, address: bytes) -> float:
        """When Zulip knew it last (Unix seconds); 0 if that is not known."""
        with self._look() as database:
            row = database.execute("SELECT changed FROM known WHERE address = ?", (address,)).fetchone()
        return 0.0 if row is None else float(row[0])

    def place(self, address: bytes) -> str:
        """What Zulip called its channel last; empty if that is not known."""
        with self._look() as database:
            row = database.execute("SELECT name FROM known WHERE address = ?", (address,)).fetchone()
        return "" if row is None else str(row[0])

    @staticmethod
    def expect_failure(database: sqlite3.Connection, address: bytes) -> None:
        """Zulip has written, or will write, a mail for this address into its file of failed mail; it is in
        good hands."""
        database.execute("INSERT INTO failure (address, at) VALUES (?, ?)", (address, time.time()))

    @staticmethod
    def is_expected_failure(database: sqlite3.Connection, address: bytes) -> bool:
        """True, once for each that was expected."""
        query = "DELETE FROM failure WHERE id = (SELECT min(id) FROM failure WHERE address = ?)"
        return database.execute(query, (address,)).rowcount > 0

    # --- What waits in Postfix's queue

    def number_queued(self, address: bytes) -> int:
        """How many mails wait for this address."""
        with self._look() as database:
            query = "SELECT count(*) FROM queued WHERE address = ?"
            return int(database.execute(query, (address,)).fetchone()[0])

    def queue(self, addresses: Iterable[bytes], queue_id: str) -> None:
        """Postfix has accepted a mail for these."""
        with self.change() as database:
            database.executemany(
                "INSERT OR REPLACE INTO queued (address, queue_id, at, accepted) VALUES (?1, ?2, ?3, ?3)",
                ((address, queue_id, time.time()) for address in addresses),
            )

    @staticmethod
    def dequeue(database: sqlite3.Connection, address: bytes, queue_id: str, is_final: bool, stale: float) -> None:
        """Postfix has brought this mail for it, which waits on if that is not final.

        stale: what should have been brought so long (seconds) before it is gone. Postfix brings what it
        has for an address in the order in which it came, or came back.
        """
        if not is_final:
            query = "UPDATE queued SET at = ? WHERE address = ? AND queue_id = ?"
            database.execute(query, (time.time(), address, queue_id))
            return
        query = "SELECT at FROM queued WHERE address = ? AND queue_id = ?"
        for (at,) in database.execute(query, (address, queue_id)).fetchall():
            query = "DELETE FROM queued WHERE address = ? AND (queue_id = ? OR at < ?)"
            database.execute(query, (address, queue_id, at - stale))

    def queued_before(self, moment: float) -> list[bytes]:
        """The addresses with a mail that was brought last, or accepted, before that time (Unix seconds)."""
        with self._look() as database:
            return [row[0] for row in database.execute("SELECT DISTINCT address FROM queued WHERE at < ?", (moment,))]

    def forget_queued(self, address: bytes, before: float) -> None:
        """What is said to wait since before that time (Unix seconds) is gone."""
        with self.change() as database:
            database.execute("DELETE FROM queued WHERE address = ? AND at < ?", (address, before))

    # --- The quarantine's index

    def copies(self) -> list[Copy]:
        """All mails in quarantine, oldest first."""
        with self._look() as database:
            return [_copy(row) for row in database.execute(f"{_COPIES} ORDER BY changed")]

    def copy(self, name: str) -> Copy | None:
        """The one with this id."""
        with self._look() as database:
            row = database.execute(f"{_COPIES} AND copy = ?", (name,)).fetchone()
        return None if row is None else _copy(row)

    def copies_refused_before(self, moment: float, most: int) -> list[Copy]:
        """Of refused mail only, not of what Zulip lost; oldest first, so many at most."""
        with self._look() as database:
            query = f"{_COPIES} AND lost = 0 AND changed <= ? ORDER BY changed LIMIT ?"
            return [_copy(row) for row in database.execute(query, (moment, most))]

    def copied_bytes(self) -> int:
        """What all copies of refused mail take on the disk (bytes)."""
        with self._look() as database:
            query = "SELECT total(disk_space(size)) FROM mail WHERE copy IS NOT NULL AND lost = 0"
            return int(database.execute(query).fetchone()[0])

    def lost_bytes(self) -> int:
        """What all copies of mail that Zulip has lost take on the disk (bytes)."""
        with self._look() as database:
            query = "SELECT total(disk_space(size)) FROM mail WHERE copy IS NOT NULL AND lost = 1 AND state != ?"
            return int(database.execute(query, (WAITING,)).fetchone()[0])

    def lost_copies(self, most: int) -> list[Copy]:
        """Of mail that Zulip has lost; oldest first, so many at most."""
        with self._look() as database:
            query = f"{_COPIES} AND lost = 1 AND state != ? ORDER BY changed LIMIT ?"
            return [_copy(row) for row in database.execute(query, (WAITING, most))]

    def number_of_copies(self) -> tuple[int, int, int]:
        """All in quarantine, those of them that Zulip lost, and those of which it has not said."""
        with self._look() as database:
            query = "SELECT count(*), total(lost), total(state = ?) FROM mail WHERE copy IS NOT NULL"
            all_, lost, waiting = database.execute(query, (WAITING,)).fetchone()
            return int(all_), int(lost - waiting), int(waiting)

    def index_copy(self, copy: Copy) -> None:
        """Take up a copy that the journal does not know."""
        # Earlier versions have left 8-bit senders in a form that cannot be stored.
        copy = copy._replace(sender=copy.sender.encode("utf-8", "backslashreplace").decode())
        with self.change() as database:
            database.execute(
                "INSERT OR IGNORE INTO mail (source, recipient, sender, queue_id, size, state, reason, received,"
                " changed, copy, lost) VALUES ('postfix', ?, ?, ?, ?, 'refused', ?, ?, ?, ?, ?)",
                (*(copy.recipient, copy.sender, copy.queue_id, copy.size, copy.reason),
                 *(copy.refused, copy.refused, copy.id, copy.lost)),
            )  # fmt: skip

    def forget_copy(self, name: str) -> None:
        """The copy is gone, or about to go."""
        with self.change() as database:
            database.execute(
                "UPDATE mail SET copy = NULL, lost = 0, recipient = '(in quarantine before)' WHERE copy = ?", (name,)
            )

    # --- The file itself

    def tidy(self, most: int) -> None:
        """Forget what is old, a little at a time, and what has become of mails beyond so many."""
        now = time.time()
        with self.change() as database:
            oldest = "SELECT id FROM mail WHERE copy IS NULL AND {} ORDER BY changed LIMIT ?"
            remove = f"DELETE FROM mail WHERE id IN ({oldest})"
            database.execute(remove.format("changed < ?"), (now - RETENTION, _AT_ONCE))
            number = database.execute("SELECT count(*) FROM mail WHERE copy IS NULL").fetchone()[0]
            # What waits has to be known, and so has what may be brought once more.
            done = "state IN ('delivered', 'refused') AND changed < ?"
            database.execute(remove.format(done), (now - _BROUGHT_AGAIN, min(max(0, number - most), _AT_ONCE)))
            for table, what, sums in (
                ("count", "outcome, cause", "number"),
                ("posted", "channel", "number"),
                ("delay", "bound", "number, seconds"),
            ):
                query = f"SELECT hour FROM {table} ORDER BY hour DESC LIMIT 1 OFFSET ?"
                too_many = database.execute(query, (most,)).fetchone()
                before = max(int((now - _COUNTED) // 3600), too_many[0] + 1 if too_many else 0)
                _sum_up(database, table, what, sums.split(", "), before)
            database.execute("DELETE FROM known WHERE changed < ?", (now - _COUNTED,))
            database.execute("DELETE FROM queued WHERE at < ?", (now - RETENTION,))
            database.execute("DELETE FROM failure WHERE at < ?", (now - _EXPECTED,))

    def forget_units(self, before: float) -> None:
        """Forget units that were consumed before that time (Unix seconds)."""
        with self.change() as database:
            database.execute("DELETE FROM unit WHERE consumed < ?", (before,))

    def damaged(self) -> list[str]:
        """Names of the files that were moved aside."""
        return sorted(path.name for path in self._path.parent.glob(f"{NAME}{DAMAGED}*"))

    def _open(self) -> sqlite3.Connection:
        if self._database is not None and not self._is_the_file():
            self.close()  # somebody has removed it
        if self._database is None:
            if not self._create and not self._path.exists():
                raise self._missing()
            self._database = self._connected()
            self._inode = self._path.stat().st_ino
        return self._database

    def _is_the_file(self) -> bool:
        try:
            return self._path.stat().st_ino == self._inode
        except OSError:
            return False

    def _connected(self) -> sqlite3.Connection:
        for suffix in ("", "-wal", "-shm"):  # SQLite would follow a link, and wait for a pipe
            with suppress(FileNotFoundError):  # who closes it last removes two of them
                files.status_of(Path(f"{self._path}{suffix}"))
        is_new = not self._path.exists()
        if is_new:
            for suffix in ("-wal", "-shm"):  # of a file that was removed: they would not fit
                Path(f"{self._path}{suffix}").unlink(missing_ok=True)
        database = sqlite3.connect(self._path, timeout=10, isolation_level=None, check_same_thread=False)
        database.create_function("disk_space", 1, disk_space, deterministic=True)
        try:
            database.execute("PRAGMA journal_mode = WAL")
            version = database.execute("PRAGMA user_version").fetchone()[0]
            if self._create and not is_new and database.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
                raise sqlite3.DatabaseError("database disk image is malformed")
            if version < len(_SCHEMA) and not self._create:
                raise self._missing()
            if version < len(_SCHEMA):
                script = "".join(_SCHEMA[version:])
                if version == 0:
                    script += f"INSERT INTO note VALUES ('since', '{time.time()}'), ('consumption unknown', 'true');"
                    self._generation += 1
                    self._began_anew = True
                database.executescript(f"BEGIN;{script}PRAGMA user_version = {len(_SCHEMA)};COMMIT")
            elif version > len(_SCHEMA):
                what = f"{self._path} was written by a later version of the gateway"
                raise Trouble("4.3.5", "journal", f"{what}; run playbooks/site.yml")
        except BaseException:
            database.close()
            raise
        return database

    def _missing(self) -> Trouble:
        what = f"there is no journal {self._path} yet; the service makes it"
        return Trouble("4.3.0", "journal", f"{what}; look at: systemctl status zulip-email-gateway")

    @contextmanager
    def _trouble(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            self.close()  # a later one may be opened in a better state
            if self._create and _is_damage(error) and self._move_aside():
                raise Trouble("4.3.0", "journal", f"{self._path} is damaged and was moved aside: {error}") from error
            what = f"cannot use the journal in {self._path.parent}: {error}"
            raise Trouble("4.3.0", "journal", f"{what}; look at its free space and its owner") from error
        except OSError as error:
            self.close()
            what = f"cannot use the journal in {self._path.parent}: {error.strerror}"
            raise Trouble("4.3.0", "journal", f"{what}; look at its free space and its owner") from error

    def _move_aside(self) -> bool:
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
        try:
            os.replace(self._path, f"{self._path}{DAMAGED}{stamp}")
        except OSError:
            return False
        return True


def add_to_count(
    database: sqlite3.Connection, outcome: str, cause: str, number: int = 1, hour: int | None = None
) -> None:
    """Count an outcome. hour: Unix seconds / 3600, now if not given."""
    database.execute(
        "INSERT INTO count VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET number = number + excluded.number",
        (int(time.time() // 3600) if hour is None else hour, outcome, cause, number),
    )


def _count_new(database: sqlite3.Connection, mail: Mail) -> None:
    """Count a mail that is heard of for the first time."""
    is_new = not database.execute("SELECT 1 FROM mail WHERE key = ?", (mail.key,)).fetchone()
    if is_new and mail.source in ("postfix", "inbox"):
        add_to_count(database, ACCEPTED, mail.source)


def _sum_up(database: sqlite3.Connection, table: str, what: str, sums: list[str], before: int) -> None:
    """What was counted before that hour, as hour 0: who reads a counter takes one that goes down for a new one."""
    columns = ", ".join(f"sum({name})" for name in sums)
    added = ", ".join(f"{name} = {name} + excluded.{name}" for name in sums)
    database.execute(
        f"INSERT INTO {table} (hour, {what}, {', '.join(sums)}) SELECT 0, {what}, {columns} FROM {table}"
        f" WHERE hour BETWEEN 1 AND ? GROUP BY {what} ON CONFLICT DO UPDATE SET {added}",
        (before - 1,),
    )
    database.execute(f"DELETE FROM {table} WHERE hour BETWEEN 1 AND ?", (before - 1,))


def _is_damage(error: sqlite3.Error) -> bool:
    """True for "malformed" and "not a database" (sqlite3's primary codes 11 and 26)."""
    return type(error) is sqlite3.DatabaseError


def _flight(row: tuple[Any, ...], journal: int) -> Flight:
    unit = None if row[4] is None else Ticket(journal, row[4])
    return Flight(row[0], row[1], row[2], bool(row[3]), unit, *row[5:])


def _copy(row: tuple[Any, ...]) -> Copy:
    return Copy._make((*row[:7], bool(row[7]), row[8] == WAITING))
