"""A relay that wants TLS and a log in, on port 2587 of the host it runs on; a line on standard output for each mail."""

import ssl
import threading

from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult


class Relay:
    async def handle_DATA(self, server, session, envelope):
        encrypted = session.ssl is not None
        print(session.auth_data.login.decode(), encrypted, *envelope.rcpt_tos, flush=True)
        return "250 taken"


def log_in(server, session, envelope, mechanism, data):
    good = data.login == b"zulip" and data.password == b"s3cret: relay"
    return AuthResult(success=good, auth_data=data)


context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
context.load_cert_chain("/etc/ssl/certs/ssl-cert-snakeoil.pem", "/etc/ssl/private/ssl-cert-snakeoil.key")
Controller(
    Relay(), hostname="0.0.0.0", port=2587, tls_context=context, require_starttls=True,
    auth_required=True, authenticator=log_in,
).start()  # fmt: skip
threading.Event().wait()
