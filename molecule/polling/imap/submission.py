"""The SMTP server of the mail provider, for its users: on port 587, after STARTTLS and a login. It delivers into
Dovecot's inbox of the user zulip."""

from __future__ import annotations

import socket
import ssl
import subprocess
import threading

from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult

USER = f"zulip@{socket.gethostname()}"


class Provider:
    async def handle_DATA(self, server, session, envelope):
        subprocess.run(["doveadm", "save", "-u", USER], input=envelope.content, check=True)
        return "250 taken"


def log_in(server, session, envelope, mechanism, data):
    good = data.login.decode() == USER and data.password == b"the password"
    return AuthResult(success=good, auth_data=data)


context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
context.load_cert_chain("/etc/ssl/imap.crt", "/etc/ssl/imap.key")
asks = {"require_starttls": True, "auth_required": True, "authenticator": log_in}
Controller(Provider(), hostname="0.0.0.0", port=587, tls_context=context, **asks).start()
threading.Event().wait()
