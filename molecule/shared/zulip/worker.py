"""The stand-in's email_mirror queue worker (zerver/worker/base.py, email_mirror.py).

It takes what has reached it, up to 100 at a time as RabbitMQ's prefetch does, and
writes its statistics exactly when Zulip's writes them: at its start (a stamp that
proves nothing), when it takes a mail up after having been idle, when it has
consumed all it had taken, and after 50 mails in between. What became of each mail it
says in the log of all workers and in its own.

Knobs for tests, files in /run/zulip-standin: "consume-seconds" (how long a mail
takes) and "redis-down" (the limiter fails: the mail goes to queue_error).
"""

from __future__ import annotations

import base64
import email
import email.policy
import json
import os
import re
import time
import traceback
from pathlib import Path

import store

STATS = Path("/var/log/zulip/queue_stats/email_mirror.stats")
ERRORS = Path("/var/log/zulip/queue_error/email_mirror.errors")
LOGS = (Path("/var/log/zulip/workers.log"), Path("/var/log/zulip/events_email_mirror.log"))
PREFETCH = 100
SETTINGS = store.settings()
PATTERN = str(SETTINGS.get("EMAIL_GATEWAY_PATTERN", ""))
# From Zulip 11 on its SMTP server is the meter.
IS_METER = store.version() < 11


def log(text: str, level: str = "INFO", logger: str = "zerver.lib.email_mirror") -> None:
    """A line as Zulip writes it, in UTC."""
    now = time.time()
    stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(now)) + f".{int(now * 1000) % 1000:03}"
    for path in LOGS:
        with path.open("a") as file:
            file.write(f"{stamp} {level} [{logger}] {text}\n")


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
            batch = self.database.execute("SELECT * FROM queue ORDER BY id LIMIT ?", (PREFETCH,)).fetchall()
            if not batch:
                # RabbitMQ would wake it up; this looks rarely once it has long been idle.
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

    def consume(self, row: store.sqlite3.Row) -> None:
        time.sleep(store.knob("consume-seconds", 0.025))
        self.database.execute("BEGIN IMMEDIATE")
        try:
            content = base64.b64decode(row["msg_base64"])
            self.post(row["rcpt_to"], email.message_from_bytes(content, policy=email.policy.default))
        except Exception:
            traceback.print_exc()
            line = json.dumps([{"rcpt_to": row["rcpt_to"], "msg_base64": row["msg_base64"]}])
            with ERRORS.open("a") as file:
                file.write(f"{time.asctime()}\t{line}\n")
        # The acknowledgement: a worker killed before it gets the mail again.
        self.database.execute("DELETE FROM queue WHERE id = ?", (row["id"],))
        self.database.execute("COMMIT")

    def post(self, rcpt_to: str, message: email.message.EmailMessage) -> None:
        is_reply = store.token_of(rcpt_to, PATTERN).startswith("mm")
        if IS_METER and not is_reply and store.limited(self.database, store.rules(SETTINGS)):
            store.drop(self.database, "rate limit")
            what = f"MirrorWorker: Rejecting an email from: {message['From']} to realm: zulip - rate limited."
            log(what, "WARN", "zerver.worker.email_mirror")
            return
        target = store.find(self.database, rcpt_to, PATTERN)
        content = text_of(message)
        if not content:
            store.drop(self.database, "no text")
            log("Email has no nonempty body sections; ignoring.")
            return
        topic = target["topic"] if is_reply else (str(message["Subject"] or "").strip() or "(no topic)")
        sender = target["user"] if is_reply else "Email Gateway"
        if not is_reply and "show-sender" in rcpt_to:
            content = f"**From:** {message['From']}\n{content}"
        self.database.execute(
            "INSERT INTO message (at, channel, topic, sender, rcpt_to, mail_id, content) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                time.time(),
                target["channel"] if is_reply else target["name"],
                topic[:60],
                sender,
                rcpt_to,
                str(message["Message-ID"] or ""),
                content[:10000],
            ),
        )
        channel = target["channel"] if is_reply else target["name"]
        log(f"Successfully processed email {'from user 9 to ' if is_reply else 'to '}{channel} (zulip)")


def text_of(message: email.message.EmailMessage) -> str:
    """The text part, else the HTML part without its tags."""
    try:
        part = message.get_body(preferencelist=("plain", "html"))
        text = part.get_content() if part is not None else ""
    except Exception:
        text = message.as_string().partition("\n\n")[2]
    if part is not None and part.get_content_type() == "text/html":
        text = re.sub(r"<[^>]+>", "", text)
    return text.replace("\0", "").strip()


if __name__ == "__main__":
    os.umask(0o022)
    Worker().run()
