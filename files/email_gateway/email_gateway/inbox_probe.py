"""Does mail to an address of Zulip's come into the inbox, and does its header still tell the address?

A mail to an address of the pattern that is nobody's (``probe``): the poller leaves it alone.
"""

from __future__ import annotations

import email.parser
import email.policy
import email.utils
import re
import smtplib
import ssl
import time
import uuid
from collections.abc import Callable
from email.message import EmailMessage

from .config import Config, Imap
from .imap_session import ImapSession
from .oauth import Tokens
from .recipient_field import FIELDS
from .verdict import Trouble

# Wait so long for the mail (seconds), and look so often.
PATIENCE, PAUSE = 120.0, 1.0


def probe(config: Config, imap: Imap, tokens: Tokens | None, server: str, say: Callable[[str], None]) -> bool:
    """Send a mail through the SMTP server `server` (host:port), with the inbox's own login, and say what became
    of it; True if Zulip's mail would be found. Raises Trouble."""
    address = config.pattern.address("probe")
    mark = f"<{uuid.uuid4().hex}@{config.pattern.domain}>"
    mailbox = ImapSession(imap, tokens, config.timeout)
    try:
        _send(config, imap, tokens, server, address, mark)
        say(f"{server} has taken a mail to {address}")
        began = time.monotonic()
        while not (uids := mailbox.with_message_id(mark)):
            if time.monotonic() - began > PATIENCE:
                say(
                    f"It has not come into {imap.folder} within {PATIENCE:.0f} s. Is it in another folder (Spam)? "
                    "Does the provider deliver mail for this address here at all? See docs/polling.md"
                )
                return False
            time.sleep(PAUSE)
        say(f"It has come into {imap.folder} after {time.monotonic() - began:.0f} s")
        header = b"".join(seen.header for seen in mailbox.headers(uids).values())
        for uid in uids:
            mailbox.remove(uid)
    finally:
        mailbox.close()
    fields = email.parser.BytesHeaderParser(policy=email.policy.compat32).parsebytes(header)
    naming = [field for field in FIELDS if any(address in str(value).lower() for value in fields.get_all(field, []))]
    if not naming:
        say("Its header does not tell the address any more: mail to a channel would not be found")
        return False
    say(f"Its header tells the address, in {', '.join(naming)}; it was deleted again")
    return True


def _send(config: Config, imap: Imap, tokens: Tokens | None, server: str, address: str, mark: str) -> None:
    mail = EmailMessage()
    mail["From"] = imap.login if "@" in imap.login else address
    mail["To"], mail["Message-ID"], mail["Subject"] = address, mark, "Does mail for Zulip come into this inbox?"
    mail["Date"] = email.utils.localtime()
    mail.set_content("Sent by zulip-email-gateway poll --try, which deletes it again.")
    host, _, port = server.rpartition(":") if re.search(r":\d+$", server) else (server, "", "587")
    try:
        context = ssl.create_default_context()
        connection: smtplib.SMTP
        if port == "465":
            connection = smtplib.SMTP_SSL(host, 465, timeout=config.timeout, context=context)
        else:
            connection = smtplib.SMTP(host, int(port), timeout=config.timeout)
        with connection:
            if port != "465" and not re.fullmatch(r"localhost|127\.[0-9.]+|::1", host):
                connection.starttls(context=context)
            connection.ehlo()
            if tokens is not None:
                sent = f"user={imap.login}\1auth=Bearer {tokens.access_token()}\1\1"
                connection.auth("XOAUTH2", lambda challenge=None: sent if challenge is None else "")
            elif connection.has_extn("auth"):
                connection.login(imap.login, imap.secrets()["password"])
            connection.send_message(mail)
    except (OSError, smtplib.SMTPException, UnicodeError) as error:
        raise Trouble("4.4.1", "SMTP", f"cannot send the mail through {server}: {error}") from error
