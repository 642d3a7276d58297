"""The stand-in's SMTP server (zerver/lib/email_mirror_server.py and the management
command email_server of Zulip 11), on the same library, with the same answers.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import email.message
import grp
import logging
import os
import pwd
import socket
import ssl
import sys

import store
from aiosmtpd.handlers import Message
from aiosmtpd.smtp import SMTP

SETTINGS = store.settings()
PATTERN = str(SETTINGS.get("EMAIL_GATEWAY_PATTERN", ""))
CERTIFICATES = (
    ("/etc/ssl/certs/zulip.combined-chain.crt", "/etc/ssl/private/zulip.key"),
    ("/etc/ssl/certs/ssl-cert-snakeoil.pem", "/etc/ssl/private/ssl-cert-snakeoil.key"),
)


class Handler(Message):
    def __init__(self) -> None:
        super().__init__(email.message.Message)
        self.database = store.connect()

    async def handle_RCPT(self, server, session, envelope, address, rcpt_options) -> str:
        logging.info("RCPT from %s, TLS: %s", session.peer[0], session.ssl is not None)
        if address.lower() == "postmaster" or (PATTERN and address.lower() == PATTERN.replace("%s", "postmaster")):
            envelope.rcpt_tos.append("postmaster")
            return "250 Continue"
        if store.database_was_restarted():
            # A management command never renews its connection.
            raise RuntimeError("the connection is closed")
        store.asked()
        try:
            found = store.find(self.database, address, PATTERN)
            is_reply = store.token_of(address, PATTERN).startswith("mm")
            if not is_reply and store.limited(self.database, store.rules(SETTINGS)):
                return "550 4.7.0 Rate-limited due to too many emails on this realm."
            store.check_access(self.database, found["channel" if is_reply else "name"])
        except store.ForwardError as failure:
            return f"550 5.1.1 Bad destination mailbox address: {failure}"
        except store.NotAllowed as reason:
            return f"550 5.7.1 Permission denied: {reason}"
        envelope.rcpt_tos.append(address)
        return "250 Continue"

    def handle_message(self, message: email.message.Message) -> None:
        encoded = base64.b64encode(bytes(message)).decode()
        # The first X-RcptTo, and aiosmtpd adds its own behind those that came.
        for address in message["X-RcptTo"].split(", "):
            if address == "postmaster":
                with (store.HOME / "postmaster").open("a") as file:
                    file.write(f"{message['Subject']}\n")
            else:
                self.database.execute("INSERT INTO queue (rcpt_to, msg_base64) VALUES (?, ?)", (address, encoded))

    async def handle_exception(self, error: Exception) -> str:
        logging.exception("SMTP session exception")
        return "500 Server error"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="manage.py email_server")
    parser.add_argument("--listen", default="0.0.0.0:25")
    parser.add_argument("--user", required=os.geteuid() == 0)
    parser.add_argument("--group", required=os.geteuid() == 0)
    cert, key = next((pair for pair in CERTIFICATES if all(os.access(path, os.R_OK) for path in pair)), (None, None))
    parser.add_argument("--tls-cert", default=cert)
    parser.add_argument("--tls-key", default=key)
    options = parser.parse_args(arguments)
    host, _, port = options.listen.rpartition(":")
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind((host or "0.0.0.0", int(port)))
    context = None
    if options.tls_cert and options.tls_key:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(options.tls_cert, options.tls_key)
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(grp.getgrnam(options.group).gr_gid)
        os.setuid(pwd.getpwnam(options.user).pw_uid)
    # On standard error, with whole addresses: aiosmtpd's own lines, and Django's.
    logging.basicConfig(level=logging.INFO)
    print(f"Listening on {options.listen}", file=sys.stderr)

    async def serve() -> None:
        handler = Handler()
        ident = "Zulip Server {}.{}".format(*store.version())
        server = await asyncio.get_running_loop().create_server(
            lambda: SMTP(handler, tls_context=context, ident=ident), sock=listening
        )
        await server.serve_forever()

    asyncio.run(serve())
