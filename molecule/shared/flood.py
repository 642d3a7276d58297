"""Offers many mails from the host it runs on, over several connections, and prints what came of them.

Run inside a test host:  podman exec -i HOST python3 - OPTIONS < flood.py
One JSON object: {"accepted": N, "refused": {"CODE TEXT": N}, "seconds": S}. A server that ends a
session (421) is connected to again, as any sender would.
"""

from __future__ import annotations

import argparse
import json
import secrets
import smtplib
import socket
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

parser = argparse.ArgumentParser()
parser.add_argument("--server", required=True)
parser.add_argument("--to", action="append", default=[], help="each in turn; else random addresses")
parser.add_argument("--domain", default="", help="of random addresses")
parser.add_argument("--count", type=int, required=True)
parser.add_argument("--seconds", type=float, default=3600, help="give up what was not offered by then")
parser.add_argument("--connections", type=int, default=20)
parser.add_argument("--subject", default="flood")
parser.add_argument("--sender", default="user@sender.example.org")
parser.add_argument("--source", default="", help="the address to connect from")
options = parser.parse_args()


def recipient(number: int) -> str:
    if options.to:
        return str(options.to[number % len(options.to)])
    reply = "mm" if number % 2 else "general."
    return f"{reply}{secrets.token_hex(16)}@{options.domain}"


def connected() -> smtplib.SMTP:
    server = smtplib.SMTP(options.server, 25, timeout=120, source_address=(options.source, 0))
    server.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    server.ehlo()
    return server


def offer(server: smtplib.SMTP, number: int) -> tuple[int, str]:
    to = recipient(number)
    code, text = server.mail(options.sender)
    if code == 250:
        code, text = server.rcpt(to)
    if code == 250:
        mail = f"From: {options.sender}\nTo: {to}\nSubject: {options.subject} {number}\n\nHello {number}\n"
        code, text = server.data(mail.encode())
    if code not in (250, 421):
        server.rset()
    return code, text.decode(errors="replace")


def session(numbers: range) -> Counter[str]:
    told: Counter[str] = Counter()
    server = None
    for number in numbers:
        while time.time() < began + options.seconds:
            try:
                server = server or connected()
                code, text = offer(server, number)
            except (smtplib.SMTPServerDisconnected, smtplib.SMTPConnectError, ConnectionError):
                server = None
                continue
            address, _, rest = text.partition(">: ")
            told[str(code) if code == 250 else f"{code} {rest or address}"] += 1
            break
    return told


began = time.time()
shares = [range(start, options.count, options.connections) for start in range(min(options.connections, options.count))]
with ThreadPoolExecutor(len(shares)) as pool:
    told = sum(pool.map(session, shares), Counter[str]())
accepted = told.pop("250", 0)
json.dump({"accepted": accepted, "refused": told, "seconds": time.time() - began}, sys.stdout)
