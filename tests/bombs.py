"""Hostile mails of 18 MB; as a program, what a function needs for all of them, in a fresh process.

python bombs.py MODULE FUNCTION prints a line for each: CPU (s), growth of the process so far
(MiB, VmHWM), what came of it, and its name.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from email_gateway.message import Message

SIZE = 18_000_000
TOP = b"Content-Type: multipart/mixed; boundary=b\n\n"


def repeat(unit: bytes, size: int = SIZE) -> Iterator[bytes]:
    block = unit * (65536 // len(unit) + 1)
    yield from (block for _ in range(size // len(block) + 1))


def parts(kind: bytes, body: bytes, number: int, fields: bytes = b"") -> Iterator[bytes]:
    yield TOP
    yield from (b"--b\nContent-Type: %s\n%s\n%s\n" % (kind, fields, body) for _ in range(number))
    yield b"--b\nContent-Type: image/png\n\nx\n--b--\n"


def nested(number: int, more: bytes = b"") -> Iterator[bytes]:
    yield from (b"Content-Type: multipart/x; boundary=b%d%s\n\n--b%d\n" % (n, more, n) for n in range(number))
    yield b"\ntext\n"


LINE = b"QUJD" * 19 + b"\r\n"
FILE = b"Content-Type: application/pdf\r\nContent-Transfer-Encoding: base64\r\n\r\n"

BOMBS: dict[str, Callable[[], Iterator[bytes]]] = {
    "text": lambda: (yield from (b"\n", *repeat(b"words words\n"))),
    "a file": lambda: (yield from (FILE, *repeat(LINE))),
    "text and a file": lambda: (yield from (TOP, b"--b\n\nwords\n--b\n", FILE, *repeat(LINE))),
    "text and a message": lambda: (
        yield from (TOP, b"--b\n\nwords\n--b\nContent-Type: message/rfc822\n\n\n", *repeat(LINE), b"--b--\n")
    ),
    "LF": lambda: repeat(b"\n"),
    "CR": lambda: repeat(b"\r"),
    "fields": lambda: repeat(b"A:\n"),
    "continuations": lambda: (yield from (b"A:\n", *repeat(b" \n"))),
    "100,000 parts": lambda: parts(b"text/plain", b"x" * 140, 100_000),
    "100,000 multiparts": lambda: parts(b"multipart/x; boundary=c", b"x" * 130, 100_000),
    "100,000 multiparts, no ASCII": lambda: parts(b"multipart/x; boundary=c", b"--c\n\n\xff", 100_000),
    "100,000 messages": lambda: parts(b"message/rfc822", b"Subject: a\n\n", 100_000),
    "10,000 deep": lambda: (yield from (*nested(10_000), *repeat(b"text\n"))),
    "100 deep": lambda: (yield from (*nested(98, b"; a=" + b'"' * 400), *repeat(b"text\n"))),
    "messages in messages": lambda: repeat(b"Content-Type: message/rfc822\n\n"),
    "blank HTML": lambda: parts(b"text/html", b"<p>" * 10_900, 98),
    "blank text": lambda: parts(b"text/plain", b"=20" * 10_900, 98, b"Content-Transfer-Encoding: quoted-printable\n"),
    "parameters": lambda: parts(b"image/png" + b";" * 4000, b"x", 30),
    "an event": lambda: (yield from (b"Content-Type: text/calendar\n\nBEGIN:VEVENT\n", b'SUMMARY;"' * 3000)),
    "broken fields": lambda: repeat(b"A: a\x0bb\n"),
    "broken continuations": lambda: (yield from (b"A: b\n", b" \x0bc\n" * 25_000, b"\n", *repeat(b"text\n"))),
    "broken headers of parts": lambda: parts(b"text/plain", b"x" * 900, 8000, b"A: a\x0bb\n"),
    "broken headers of 100,000 parts": lambda: parts(b"text/plain", b"x" * 130, 100_000, b"A: a\x0bb\n"),
    "long broken headers": lambda: parts(b"text/plain", b"", 70, b"A:\n" * 80_000 + b"A: a\x0bb\n"),
    "broken reports": lambda: (yield from (b"Content-Type: message/delivery-status\n\n", *repeat(b"A: a\x0bb\n\n"))),
    "\\x0b": lambda: (yield from (b"A: b\n\n", *repeat(b"\x0b"))),
}  # fmt: skip


def measured(function: Callable[[Message, Path], Message], name: str, folder: Path) -> tuple[float, str]:
    """CPU time (s), and what came of it."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.writelines(BOMBS[name]())
        file.flush()
        message = Message(file)
        started = time.process_time()
        try:
            result = "unchanged" if function(message, folder) is message else "changed"
        except Exception as error:
            result = str(error)
        return time.process_time() - started, result


def measured_alone(module: str, function: str) -> str:
    """What this program prints."""
    command = [sys.executable, __file__, module, function]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


def most_memory() -> float:
    """The most memory that this process has had (MiB)."""
    found = re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


if __name__ == "__main__":
    function = getattr(importlib.import_module(sys.argv[1]), sys.argv[2])
    measured(function, "text", Path(tempfile.gettempdir()))
    before = most_memory()
    for name in BOMBS:
        used, result = measured(function, name, Path(tempfile.gettempdir()))
        print(f"{used:.3f} s  {most_memory() - before:5.1f} MiB  {result}: {name}")
