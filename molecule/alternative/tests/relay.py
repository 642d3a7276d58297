"""A relay that wants TLS and a login, on the ports 2587 (STARTTLS) and 465 of the host it runs on; a line on standard
output for each mail."""

import ssl
import subprocess
import threading

from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult

KEY, CERTIFICATE = "/root/relay.key", "/root/relay.crt"
NAME = "outside.example.com"


class Relay:
    async def handle_DATA(self, server, session, envelope):
        # With TLS from the first byte aiosmtpd does not note it in the session.
        encrypted = session.ssl is not None or server.transport.get_extra_info("cipher") is not None
        print(session.auth_data.login.decode(), encrypted, *envelope.rcpt_tos, flush=True)
        return "250 taken"


def log_in(server, session, envelope, mechanism, data):
    good = data.login == b"zulip" and data.password == b"s3cret: relay"
    return AuthResult(success=good, auth_data=data)


made = f"openssl req -x509 -newkey rsa:2048 -nodes -keyout {KEY} -out {CERTIFICATE} -subj /CN={NAME}".split()
subprocess.run([*made, "-addext", f"subjectAltName=DNS:{NAME}"], check=True, capture_output=True)
context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
context.load_cert_chain(CERTIFICATE, KEY)
asks = {"hostname": "0.0.0.0", "auth_required": True, "authenticator": log_in}
Controller(Relay(), port=2587, tls_context=context, require_starttls=True, **asks).start()
Controller(Relay(), port=465, ssl_context=context, auth_require_tls=False, **asks).start()
print("ready", flush=True)
threading.Event().wait()
