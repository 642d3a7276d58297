"""Sends mail from the host it runs on, and prints what the server answered.

Run inside a test host:  podman exec -i HOST python3 - OPTIONS < send.py
One JSON object: {"accepted": N, "refused": [[recipient, code, text], ...],
"began": Unix time of the first connection}.
"""

from __future__ import annotations

import argparse
import base64
import email.message
import email.utils
import json
import smtplib
import ssl
import sys
import time
from concurrent.futures import ThreadPoolExecutor

parser = argparse.ArgumentParser()
parser.add_argument("--server", required=True)
parser.add_argument("--to", required=True, action="append", help="once for each mail; --count repeats them")
parser.add_argument("--sender", default="user@sender.example.org")
parser.add_argument("--author", default="", help="for From, if not the sender")
parser.add_argument("--subject", default="a mail")
parser.add_argument("--text", default="Hello")
parser.add_argument("--header", action="append", default=[], help="Name: value")
parser.add_argument("--count", type=int, default=1)
parser.add_argument("--size", type=int, default=0, help="bytes of the text, in lines of letters")
parser.add_argument("--binary", action="store_true", help="with --size: text whose base64 has many + and /")
parser.add_argument("--parts", type=int, default=0, help="of the mail, which is a multipart then")
parser.add_argument("--raw", default="", help="all of the message, in base64")
parser.add_argument("--starttls", action="store_true")
options = parser.parse_args()


def message(number: int, recipient: str) -> bytes:
    if options.raw:
        return base64.b64decode(options.raw)
    mail = email.message.EmailMessage()
    mail["From"] = options.author or options.sender or "MAILER-DAEMON@sender.example.org"
    mail["To"] = recipient
    mail["Subject"] = options.subject if options.count == 1 else f"{options.subject} {number}"
    mail["Date"] = email.utils.formatdate()
    mail["Message-ID"] = email.utils.make_msgid(domain="sender.example.org")
    if options.size:
        line = b"\xfb\xff\xbf\xfe\xff\xef" * 10 if options.binary else b"letters " * 9
        body = (line + b"\r\n") * (options.size // (len(line) + 2) + 1)
        mail["Content-Transfer-Encoding"] = "8bit"
        mail["Content-Type"] = "text/plain; charset=iso-8859-1"
        raw = mail.as_bytes().replace(b"\n", b"\r\n").rstrip() + b"\r\n\r\n" + body[: options.size]
    elif options.parts:
        kind = b"Content-Type: multipart/mixed; boundary=b\r\n"
        parts = f"--b\r\n\r\n{options.text}\r\n" * options.parts
        raw = kind + mail.as_bytes().replace(b"\n", b"\r\n") + parts.encode() + b"--b--\r\n"
    else:
        mail.set_content(options.text)
        raw = mail.as_bytes().replace(b"\n", b"\r\n")
    extra = "".join(f"{line}\r\n" for line in options.header).replace("\\r", "\r").replace("\\n", "\r\n").encode()
    return extra + raw


def session(numbers: list[int]) -> tuple[int, list[list[object]]]:
    accepted, refused = 0, []
    with smtplib.SMTP(options.server, 25, timeout=60) as server:
        if options.starttls:
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            server.starttls(context=context)
        for number in numbers:
            for recipient in options.to:
                server.ehlo_or_helo_if_needed()
                server.command_encoding = "utf-8"
                code, text = server.mail(options.sender, [] if options.sender.isascii() else ["SMTPUTF8"])
                if code == 250:
                    code, text = server.rcpt(recipient if recipient.startswith("<") else f"<{recipient}>")
                if code == 250:
                    code, text = server.data(message(number, recipient))
                if code == 250:
                    accepted += 1
                else:
                    refused.append([recipient, code, text.decode(errors="replace")])
                    server.rset()
    return accepted, refused


began = time.time()
sessions = min(options.count, 10)
shares = [list(range(start, options.count + 1, sessions)) for start in range(1, sessions + 1)]
with ThreadPoolExecutor(sessions) as pool:
    results = list(pool.map(session, shares))
json.dump(
    {
        "accepted": sum(accepted for accepted, _ in results),
        "refused": [one for _, refused in results for one in refused],
        "began": began,
    },
    sys.stdout,
)
