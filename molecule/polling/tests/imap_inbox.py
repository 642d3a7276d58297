"""An inbox on the scenario's Dovecot: what stands in it, and what is put into it."""

from __future__ import annotations

import json
from collections.abc import Sequence

from conftest import ZulipHost

POLL = "zulip-email-gateway-poll"
# Runs on the IMAP server: appends mails, one by one, and prints when each began.
APPEND = r"""
import imaplib, json, sys, time
job = json.load(sys.stdin)
box = imaplib.IMAP4("127.0.0.1")
box.login(job["user"], job["password"])
began = []
for mail in job["mails"]:
    began.append(time.time())
    box.append(job["folder"], None, None, mail.encode("latin-1"))
    time.sleep(job["pause"])
box.logout()
print(json.dumps(began))
"""


class Inbox:
    def __init__(self, mx: ZulipHost, imap: ZulipHost) -> None:
        self.mx, self.imap = mx, imap
        self.user, self.password = f"zulip@{imap.fqdn}", "the password"
        local = mx.address().partition("@")[0]
        self.channel = self.user.replace("@", f"+{local}@")
        self.reply = self.user.replace("@", f"+{mx.reply_address().partition('@')[0]}@")

    def append(self, *subjects: str, to: str = "", pause: float = 0.0, folder: str = "INBOX") -> list[float]:
        """Put mails into the folder; the Unix times at which each APPEND began."""
        mails = [
            f"From: user@example.org\r\nTo: {to or self.channel}\r\nSubject: {subject}\r\n\r\nHello\r\n"
            for subject in subjects
        ]
        return self.put(mails, pause, folder)

    def put(self, mails: Sequence[str], pause: float = 0.0, folder: str = "INBOX") -> list[float]:
        job = {"user": self.user, "password": self.password, "folder": folder, "mails": mails, "pause": pause}
        script = f"python3 -c '{APPEND}' <<'EOF'\n{json.dumps(job)}\nEOF\n"
        return list(json.loads(self.imap.sh(script)))

    def fill(self, number: int, to: str, folder: str = "INBOX", subject: str = "x") -> None:
        """Put so many mails into the folder at once."""
        mail = f"From: user@example.org\nTo: {to}\nSubject: {subject} \n\nHello\n"
        script = f"for i in $(seq {number}); do doveadm save -u {self.user} -m '{folder}' <<'EOF'\n{mail}\nEOF\ndone"
        self.imap.sh(script)

    def count(self, folder: str = "INBOX") -> int:
        script = f"doveadm mailbox list -u {self.user} | grep -Fxq '{folder}' || exit 0; "
        return int(
            self.imap.sh(f"{script} doveadm mailbox status -u {self.user} messages '{folder}'").rpartition("=")[2] or 0
        )

    def forgive(self) -> None:
        """Dovecot makes a client wait whose login has failed, until it is restarted."""
        self.imap.sh("systemctl restart dovecot")

    def empty(self) -> None:
        for folder in ("INBOX", "Zulip-Failed"):
            self.imap.host.run(f"doveadm expunge -u {self.user} mailbox {folder} all")
