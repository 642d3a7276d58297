"""The mail server of sender.example.org, on port 25 of the host it runs on, which knows SMTPUTF8 (RFC 6531).

What it takes stands in /root/mailbox, a file for each mail.
"""

from __future__ import annotations

import itertools
import threading
from pathlib import Path

from aiosmtpd.controller import Controller

FOLDER = Path("/root/mailbox")
FOLDER.mkdir(exist_ok=True)
numbers = itertools.count(len(list(FOLDER.iterdir())))


class Mailbox:
    async def handle_DATA(self, server, session, envelope):
        head = f"From {envelope.mail_from}, to {envelope.rcpt_tos}, {envelope.mail_options}\n"
        (FOLDER / str(next(numbers))).write_bytes(head.encode() + envelope.original_content)
        return "250 taken"


Controller(Mailbox(), hostname="0.0.0.0", port=25, enable_SMTPUTF8=True).start()
threading.Event().wait()
