"""Hostile mails of 18 MB; as a program, what functions need for them, in a fresh process.

python bombs.py TRIAL prints, in JSON, a Needed for each of its bombs and functions.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from email_gateway.forgery import forged
from email_gateway.header_repair import enterable
from email_gateway.message import Message
from email_gateway.postable import postable
from email_gateway.wire_format import write_wire_format

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


Bomb = Callable[[], Iterator[bytes]]
LINE = b"QUJD" * 19 + b"\r\n"
FILE = b"Content-Type: application/pdf\r\nContent-Transfer-Encoding: base64\r\n\r\n"

BOMBS: dict[str, Bomb] = {
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


# For wire_format, which looks for overlong lines in whatever parts there are.
OVERLONG = b"x" * 999


def filled(unit: bytes, number: int) -> Iterator[bytes]:
    """A multipart with that many parts; their bodies fill it up."""
    yield TOP
    body = b"t" * min(90, max(0, SIZE // number - len(unit) - 1))
    yield from (b"%s%s\n" % (unit, body) * 100 for _ in range(number // 100))


def deep(number: int) -> Iterator[bytes]:
    number = min(number, SIZE // 60)
    yield from (b"Content-Type: multipart/mixed; boundary=b%d\n\n--b%d\n" % (n, n) for n in range(number))
    yield from repeat(b"text\n", SIZE - number * 60)


def boundaries_in_a_field() -> Iterator[bytes]:
    yield b"Content-Type: multipart/mixed"
    yield from (b"; boundary=%d" % number for number in range(1_000_000))
    yield b"\n\n"
    yield from repeat(b"--1\n", SIZE // 10)


LINE_ENDS: dict[str, Bomb] = {
    "CRLF": lambda: repeat(b"\r\n"),
    "dots": lambda: repeat(b".\n"),
}
LINES: dict[str, Bomb] = {
    "LF": lambda: repeat(b"\n"),
    "CR": lambda: repeat(b"\r"),
    "fields": lambda: repeat(b"A:\n"),
    "continuations": lambda: (yield from (b"A:\n", *repeat(b" \n"))),
}
PARTS: dict[str, Bomb] = {
    "encodings": lambda: repeat(b"Content-Transfer-Encoding:\n"),
    "100,000 parts": lambda: filled(b"--b\nContent-Type: text/plain\n\n", 100_000),
    "4,500,000 empty parts": lambda: filled(b"--b", SIZE // 4),
    "attached messages": lambda: repeat(b"Content-Type: message/rfc822\n\n"),
    "10,000 deep": lambda: deep(10_000),
    "300,000 deep": lambda: deep(300_000),
    "no boundaries": lambda: (yield from (TOP, *repeat(b"--x\n"))),
}
OVERLONG_LINES: dict[str, Bomb] = {
    "one line": lambda: repeat(b"x"),
    "a line of spaces": lambda: repeat(b" "),
    "a line of words": lambda: repeat(b"a b "),
    "a body of one line": lambda: (yield from (b"\n", *repeat(b"\x80"))),
    "parts with overlong lines": lambda: filled(b"--b\n\n" + OVERLONG, SIZE // 1000),
    "1,000,000 boundaries in a field": boundaries_in_a_field,
    "quoted-printable": lambda: (yield from (b"Content-Transfer-Encoding: quoted-printable\n\n", *repeat(b"=41"))),
    "base64": lambda: (yield from (b"Content-Transfer-Encoding: base64\n\n", *repeat(b"QUJD"))),
}


def and_an_overlong_line(bomb: Bomb) -> Bomb:
    return lambda: chain(bomb(), [b"\n\n--b1\n\n" + OVERLONG])


class Nothing(io.RawIOBase):
    """What write_wire_format writes to."""

    def write(self, data: object) -> int:
        return memoryview(data).nbytes  # type: ignore[arg-type]


def forgery(message: Message, _: Path) -> str:
    return forged(message)


def written(message: Message, _: Path) -> None:
    write_wire_format(message.file(), Nothing())


class Trial(NamedTuple):
    """Bombs; what each of them is given to, and how long that may take (s of CPU); memory for all of them (MiB)."""

    bombs: dict[str, Bomb]
    functions: dict[Callable[[Message, Path], object], float]
    mebibytes: float


# About two or three times what was measured: for a machine under load.
TRIALS = {
    "looked into": Trial(BOMBS, {postable: 1, enterable: 1, forgery: 0.5}, 12),
    "written": Trial(LINE_ENDS | LINES, {written: 0.9}, 6),  # of parts it sees nothing then
    "shortened": Trial(
        OVERLONG_LINES | {name: and_an_overlong_line(bomb) for name, bomb in (LINES | PARTS).items()},
        {written: 3},
        8,
    ),
}


class Needed(NamedTuple):
    """Growth of the process until then (MiB, VmHWM), CPU time (s), what both was for, and what came of that."""

    mebibytes: float
    seconds: float
    most_seconds: float
    what: str
    result: str


def needed(trial: str) -> list[Needed]:
    """What it takes, in a process of its own."""
    command = [sys.executable, __file__, trial]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return [Needed(*one) for one in json.loads(done.stdout)]


def measured(trial: Trial, name: str, content: Iterator[bytes], memory_before: float = 0) -> Iterator[Needed]:
    """What it takes for one bomb, by function."""
    with tempfile.TemporaryFile() as file:
        file.writelines(content)
        file.flush()
        message = Message(file)
        for function, most_seconds in trial.functions.items():
            started = time.process_time()
            try:
                found = function(message, Path(tempfile.gettempdir()))
            except Exception as error:
                found = error
            used = time.process_time() - started
            if isinstance(found, Message):
                found = "unchanged" if found is message else "changed"
            what = f"{name}, {function.__name__}"
            yield Needed(most_memory() - memory_before, used, most_seconds, what, str(found or "")[:99])


def most_memory() -> float:
    """The most memory that this process has had (MiB)."""
    found = re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def main(trial: Trial) -> list[Needed]:
    *_, before = measured(trial, "", repeat(b"words words\n", 10_000))
    return [one for name, bomb in trial.bombs.items() for one in measured(trial, name, bomb(), before.mebibytes)]


if __name__ == "__main__":
    json.dump(main(TRIALS[sys.argv[1]]), sys.stdout)
