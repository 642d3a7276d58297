"""The stand-in's management command email_mirror: Zulip's own polling, with its habits.

It looks at every mail in the folder, marks each as deleted whatever became of it, and
posts from its own process (zerver/management/commands/email_mirror.py).
"""

from __future__ import annotations

import configparser
import email
import email.policy
import imaplib
import re
import sys

import store
import worker

SETTINGS = store.settings()
FIELDS = ("X-Gm-Original-To", "Delivered-To", "Envelope-To", "Resent-To", "Resent-CC", "To", "CC")


def recipient_of(message: email.message.EmailMessage) -> str:
    pattern = ".*?".join(re.escape(part) for part in str(SETTINGS["EMAIL_GATEWAY_PATTERN"]).split("%s"))
    for field in FIELDS:
        for value in message.get_all(field, []):
            addresses = getattr(value, "addresses", None)
            for address in [one.addr_spec for one in addresses] if addresses is not None else [str(value)]:
                if re.match(pattern, address):
                    return address
    raise store.ForwardError("Missing recipient in mirror email")


def main() -> None:
    secrets = configparser.RawConfigParser()
    secrets.read("/etc/zulip/zulip-secrets.conf")
    password = secrets.get("secrets", "email_gateway_password", fallback="")
    values = [SETTINGS.get(f"EMAIL_GATEWAY_{name}") for name in ("LOGIN", "IMAP_SERVER", "IMAP_PORT", "IMAP_FOLDER")]
    if not password or not all(values):
        sys.exit(
            "CommandError: Please configure the email mirror gateway in /etc/zulip/, "
            "or specify $ORIGINAL_RECIPIENT if piping a single mail."
        )
    login, server, port, folder = values
    box = imaplib.IMAP4_SSL(server, port)
    box.login(login, password)
    # It is a process of its own, with other logs.
    worker.LOGS[:] = [worker.ERRORS_LOG.with_name("manage.log")]
    try:
        box.select(folder)
        poster = worker.Worker(statistics=False)
        for number in box.search(None, "ALL")[1][0].split():
            raw = box.fetch(number, "(RFC822)")[1][0][1]
            message = email.message_from_bytes(raw, policy=email.policy.default)
            try:
                address = recipient_of(message)
                store.find(poster.database, address, str(SETTINGS["EMAIL_GATEWAY_PATTERN"]))
                poster.post(address, message)
            except (store.ForwardError, worker.Dropped) as failure:
                print(f"{failure}", file=sys.stderr)
            box.store(number, "+FLAGS", "\\Deleted")
        box.expunge()
        box.close()
    finally:
        box.logout()
