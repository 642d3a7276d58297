"""An OAuth 2 token endpoint (RFC 6749) for Dovecot's users, its device flow (RFC 8628), and its tokeninfo.

https://HOST:8443/token and /device for clients, http://127.0.0.1:8081/tokeninfo for
Dovecot. Knobs: /run/token-seconds (how long a token is good), /run/consent (is there once
the user has consented). What it was asked stands in /var/log/tokens.log.
"""

from __future__ import annotations

import json
import secrets
import socket
import ssl
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

# Access tokens: the user and when they expire. Refresh tokens are good for one use.
access: dict[str, tuple[str, float]] = {}
USER = f"zulip@{socket.gethostname()}"
refresh = {"the first refresh token": USER}
CLIENTS = (("zulip", "the client's secret"), ("public", None))
DEVICE = "urn:ietf:params:oauth:grant-type:device_code"


class Handler(BaseHTTPRequestHandler):
    def answer(self, status: int, **fields: object) -> None:
        body = json.dumps(fields).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        asked = dict(urllib.parse.parse_qsl(self.rfile.read(int(self.headers["Content-Length"])).decode()))
        with Path("/var/log/tokens.log").open("a") as log:
            log.write(f"{asked.get('grant_type')} {asked.get('scope', '')}\n")
        if (asked.get("client_id"), asked.get("client_secret")) not in CLIENTS:
            self.answer(401, error="invalid_client")
            return
        if self.path == "/device":
            page = f"https://{socket.gethostname()}:8443/consent"
            self.answer(200, device_code="d", user_code="ABCD-EFGH", verification_uri=page, expires_in=60, interval=1)
            return
        more = {}
        if asked["grant_type"] == "client_credentials" and asked["client_id"] == "zulip":
            user = USER
        elif asked["grant_type"] == DEVICE and asked["device_code"] == "d":
            if not Path("/run/consent").exists():
                self.answer(400, error="authorization_pending")
                return
            user = USER
            more["refresh_token"] = secrets.token_urlsafe()
            refresh[more["refresh_token"]] = user
        elif asked.get("refresh_token") in refresh:
            user = refresh.pop(asked["refresh_token"])
            more["refresh_token"] = secrets.token_urlsafe()
            refresh[more["refresh_token"]] = user
        else:
            self.answer(400, error="invalid_grant", error_description="The refresh token is unknown or was used.")
            return
        knob = Path("/run/token-seconds")
        seconds = float(knob.read_text()) if knob.exists() else 3600
        token = secrets.token_urlsafe()
        access[token] = (user, time.time() + seconds)
        self.answer(200, access_token=token, token_type="Bearer", expires_in=int(seconds), **more)

    def do_GET(self) -> None:
        token = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query).get("access_token", [""])[0]
        user, expires = access.get(token, ("", 0.0))
        if expires > time.time():
            self.answer(200, username=user, active="true")
        else:
            self.answer(401, active="false")

    def log_message(self, *_: object) -> None:
        pass


public = ThreadingHTTPServer(("0.0.0.0", 8443), Handler)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain("/etc/ssl/imap.crt", "/etc/ssl/imap.key")
public.socket = context.wrap_socket(public.socket, server_side=True)
threading.Thread(target=public.serve_forever, daemon=True).start()
ThreadingHTTPServer(("127.0.0.1", 8081), Handler).serve_forever()
