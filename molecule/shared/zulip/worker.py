"""The stand-in's email_mirror queue worker (zerver/worker/base.py, email_mirror.py).

It takes what has reached it, up to 100 at a time as RabbitMQ's prefetch does, one mail
after the other. What became of each it says in the log of all workers, and in its own, which
supervisor renames when it has grown. Its statistics are written exactly when Zulip's
worker writes them. A mail that it fails with stands in queue_error afterwards; if its
database connection is broken it ends, and RabbitMQ gives the next one the same mail.

Knobs for tests, files in /run/zulip-standin: "consume-seconds" (how long a mail
takes), "redis-down" (the limiter fails), "database-restart" (touched: PostgreSQL was
restarted) and "log-bytes" (when supervisor renames).
"""

from __future__ import annotations

import base64
import email
import email.policy
import hashlib
import json
import os
import re
import sys
import time
import traceback
from pathlib import Path

import store

STATS = Path("/var/log/zulip/queue_stats/email_mirror.stats")
ERRORS = Path("/var/log/zulip/queue_error/email_mirror.errors")
LOGS = [Path("/var/log/zulip/workers.log"), Path("/var/log/zulip/events_email_mirror.log")]
ERRORS_LOG = Path("/var/log/zulip/errors.log")
PREFETCH = 100
MOST_KEPT = 3 * 2**20
SETTINGS = store.settings()
PATTERN = str(SETTINGS.get("EMAIL_GATEWAY_PATTERN", ""))
VERSION = store.version()
# From Zulip 11 on its SMTP server is the meter.
IS_METER = VERSION < (11, 0)
# Seconds for a mail. What takes longer is dropped; up to 6 it stands in queue_error.
MOST_SECONDS = 5 if VERSION >= (7, 0) else 30


def log(text: str, level: str = "INFO", logger: str = "zerver.lib.email_mirror", paths: list[Path] = LOGS) -> None:
    """A line as Zulip writes it, in UTC."""
    now = time.time()
    stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(now)) + f".{int(now * 1000) % 1000:03}"
    most = store.knob("log-bytes", 10 * 2**20)
    for path in paths:
        if path.name.startswith("events") and path.exists() and path.stat().st_size > most:
            path.rename(f"{path}.1")
        with path.open("a") as file:
            file.write(f"{stamp} {level:4} [{logger}] {text}\n")


class Worker:
    def __init__(self, statistics: bool = True) -> None:
        self.database = store.connect()
        for path in LOGS if statistics else ():
            path.touch()
        self.times: list[float] = []
        self.emptied = time.time()
        self.since_emptied = 0
        self.idle = True
        if statistics:
            self.write_statistics()

    def write_statistics(self) -> None:
        recent = self.times[-50:]
        draft = STATS.with_suffix(".tmp")
        draft.write_text(
            json.dumps(
                {
                    "update_time": time.time(),
                    "recent_average_consume_time": sum(recent) / len(recent) if recent else None,
                    "queue_last_emptied_timestamp": self.emptied,
                    "consumed_since_last_emptied": self.since_emptied,
                },
                indent=2,
            )
        )
        draft.rename(STATS)

    def run(self) -> None:
        while True:
            seen = self.version()  # before it looks: nothing that comes meanwhile is overlooked
            batch = self.database.execute("SELECT * FROM queue ORDER BY id LIMIT ?", (PREFETCH,)).fetchall()
            if not batch:
                # RabbitMQ would wake it up; this looks rarely once it has long been idle, and whether anybody else has
                # changed the database before it looks there.
                while self.version() == seen:
                    time.sleep(0.005 if time.time() < self.emptied + 1 else 0.03)
                continue
            for number, row in enumerate(batch, 1):
                if self.idle:
                    self.idle = False
                    self.write_statistics()
                started = time.time()
                self.consume(row)
                self.times.append(time.time() - started)
                self.since_emptied += 1
                if number == len(batch):
                    self.emptied, self.since_emptied, self.idle = time.time(), 0, True
                    self.write_statistics()
                elif number % 50 == 0:
                    self.write_statistics()

    def version(self) -> int:
        return int(self.database.execute("PRAGMA data_version").fetchone()[0])

    def consume(self, row: store.sqlite3.Row) -> None:
        seconds = store.knob("consume-seconds", 0.025)
        time.sleep(min(seconds, MOST_SECONDS))
        self.database.execute("BEGIN IMMEDIATE")
        try:
            if store.database_was_restarted():
                raise RuntimeError("server closed the connection unexpectedly")
            content = base64.b64decode(row["msg_base64"])
            if len(content) < MOST_KEPT:  # for tests that compare it
                self.database.execute(
                    "INSERT INTO taken (rcpt_to, msg_base64) VALUES (?, ?)", (row["rcpt_to"], row["msg_base64"])
                )
            self.handle(row["rcpt_to"], email.message_from_bytes(content, policy=email.policy.default), seconds)
        except Exception:
            log(f"Problem handling data on queue email_mirror\n{traceback.format_exc()}", "ERR", "")
            line = json.dumps([{"rcpt_to": row["rcpt_to"], "msg_base64": row["msg_base64"]}])
            with ERRORS.open("a") as file:
                file.write(f"{time.asctime()}\t{line}\n")
            if store.database_was_restarted():
                log("*** Sending self SIGUSR1 to trigger a restart.", "WARN", "", [ERRORS_LOG])
                self.database.execute("ROLLBACK")
                sys.exit(3)
        # The acknowledgement: a worker killed before it gets the mail again.
        self.database.execute("DELETE FROM queue WHERE id = ?", (row["id"],))
        self.database.execute("COMMIT")

    def handle(self, rcpt_to: str, message: email.message.EmailMessage, seconds: float) -> None:
        """MirrorWorker.consume, for a mail that takes so long."""
        is_reply = store.token_of(rcpt_to, PATTERN).startswith("mm")
        if not is_reply:
            store.find(self.database, rcpt_to, PATTERN)
            if IS_METER and store.limited(self.database, store.rules(SETTINGS)):
                store.drop(self.database, "rate limit")
                what = f"MirrorWorker: Rejecting an email from: {message['From']} to realm: zulip - rate limited."
                log(what, "WARN", "zerver.worker.email_mirror")
                return
        if seconds > MOST_SECONDS and VERSION < (7, 0):
            raise RuntimeError(f"Timed out in email_mirror after {MOST_SECONDS} seconds processing 1 events")
        if seconds > MOST_SECONDS:
            store.drop(self.database, "time limit")
            what = f"{message['Message-ID'] or '<?>'} to {rcpt_to} ({len(bytes(message))} bytes)"
            log(f"Timed out ingesting message-id {what} -- dropping!", "ERR", "")
            return
        try:
            self.post(rcpt_to, message)
        except Dropped as reason:
            # Not the same to a test: somebody has only asked for the address.
            store.drop(self.database, str(reason) if message.keys() or message.get_payload() else store.QUESTION)
            log(str(reason))
        except store.ForwardError as failure:
            store.drop(self.database, "address gone")
            hidden = "X" * len(rcpt_to.partition("@")[0]) + "@" + rcpt_to.partition("@")[2]
            log(f"Sender: {message['From']}\nTo: {hidden} <Invalid address>\n{failure}", "ERR")

    def post(self, rcpt_to: str, message: email.message.EmailMessage) -> None:
        """zerver/lib/email_mirror.py, process_message."""
        is_reply = store.token_of(rcpt_to, PATTERN).startswith("mm")
        automatic = str(message["Auto-Submitted"] or "")
        if is_reply and VERSION >= (11, 2) and automatic in ("auto-replied", "auto-generated"):
            raise Dropped(f"Dropping {automatic} message from {message['From']}")
        target = store.find(self.database, rcpt_to, PATTERN)
        channel = target["channel"] if is_reply else target["name"]
        user = target["user"] if is_reply else target["sender"]
        if is_reply and self.database.execute("SELECT * FROM inactive WHERE user = ?", (user,)).fetchone():
            store.drop(self.database, "inactive user")
            log("Sending user is not active. Ignoring this message notification email.", "WARN")
            return
        try:
            store.check_access(self.database, channel)
            refused = ""
        except store.NotAllowed as reason:
            refused = str(reason)
        if refused and not is_reply and VERSION >= (10, 0):
            store.drop(self.database, "not allowed")
            log(f"Failed to process email to {channel} (zulip): {refused}")
            return
        include_quotes = "include-quotes" in rcpt_to.replace("+", ".").split("@")[0].split(".")
        content = body_of(message, include_quotes) + attachments_of(message)
        if not is_reply and "show-sender" in rcpt_to:
            content = f"**From:** {message['From']}\n{content}"
        if refused and not is_reply:
            # zerver/actions/message_send.py, _internal_prep_message; what follows is logged all the same.
            store.drop(self.database, "not allowed")
            log(f"Error queueing internal message by emailgateway@zulip.com: {refused}\nTraceback ...", "ERR", "")
        elif refused:
            refused = f"Error sending message to channel {channel} via message notification email reply:\n{refused}"
            self.add(f"direct message to {user}", "", "Notification Bot", rcpt_to, message, refused)
        else:
            topic = target["topic"] if is_reply else (str(message["Subject"] or "").strip() or "(no topic)")
            self.add(channel, topic, user, rcpt_to, message, content)
        log("Successfully processed email " + (f"from user 9 to {channel}" if is_reply else f"to {channel} (zulip)"))

    def add(
        self, channel: str, topic: str, sender: str, rcpt_to: str, message: email.message.EmailMessage, content: str
    ) -> None:
        self.database.execute(
            "INSERT INTO message (at, channel, topic, sender, rcpt_to, mail_id, content) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (time.time(), channel, topic[:60], sender, rcpt_to, str(message["Message-ID"] or ""), content[:10000]),
        )


class Dropped(Exception):
    """ZulipEmailForwardUserError."""


def body_of(message: email.message.EmailMessage, include_quotes: bool) -> str:
    """The first text part, else the first HTML part, without quotations (zerver/lib/email_mirror.py, extract_body)."""
    plain, html = (part_of(message, kind) for kind in ("text/plain", "text/html"))
    if plain is None and html is None:
        log(f"Content types: {[part.get_content_type() for part in message.walk()]}", "WARN")
        raise Dropped("Unable to find plaintext or HTML message body")
    if html is not None:
        html = re.sub(r"<[^>]+>", "", html).strip()
    # A quotation, as a rule: lines that begin with ">", and the one before them.
    if plain is not None and not include_quotes:
        plain = re.sub(r"(?m)^(?:On .* wrote:\n+)?(?:>.*(?:\n|\Z))+", "", plain)
    plain = (plain or "").replace("\0", "").strip()
    if not plain and not html:
        raise Dropped("Email has no nonempty body sections; ignoring.")
    return plain or html


def part_of(message: email.message.EmailMessage, kind: str) -> str | None:
    for part in message.walk():
        if part.get_content_type() == kind:
            content = part.get_payload(decode=True)
            try:
                return content.decode(part.get_content_charset() or "us-ascii", "ignore")
            except LookupError:
                return content.decode("us-ascii", "ignore")
    return None


def attachments_of(message: email.message.EmailMessage) -> str:
    """A link to each part with a filename; what is no bytes is left out."""
    links = ""
    for part in message.walk():
        filename = part.get_filename()
        content = part.get_payload(decode=True) if filename else None
        if filename and isinstance(content, bytes):
            links += f"\n[{filename}](/user_uploads/{hashlib.sha256(content).hexdigest()})"
        elif filename:
            log(f"Payload is not bytes (invalid attachment {filename} in message from {message['From']}).", "WARN")
    return links


if __name__ == "__main__":
    os.umask(0o022)
    Worker().run()
