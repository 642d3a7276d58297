"""What reads what others send, and what must be true whatever that is.

Each target takes bytes, and raises if a promise is broken. test_fuzz.py runs them with hypothesis and with
the corpus, run.py (make fuzz) with atheris.
"""

from __future__ import annotations

import atexit
import email
import mmap
import re
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import zulip_info
from email_gateway import (
    address_book,
    addresses,
    backend_http,
    milter,
    policy,
    service,
    submission,
    verdict,
    worker_log,
)
from email_gateway.address_book import AddressBook
from email_gateway.backend_http import HttpBackend
from email_gateway.backend_smtp import SmtpBackend
from email_gateway.config import Imap
from email_gateway.failures import _decode, _mails
from email_gateway.forgery import forged
from email_gateway.gateway import Gateway
from email_gateway.header_repair import NeverAccepted, enterable
from email_gateway.imap_session import ImapSession
from email_gateway.journal import Journal
from email_gateway.mail_parts import Unsure
from email_gateway.marked import marked
from email_gateway.message import Message
from email_gateway.postable import postable
from email_gateway.recipient_field import find_recipients
from email_gateway.verdict import Deferred, Delivered, Refused, Trouble
from email_gateway.wire_format import write_wire_format
from mails import mail, text
from test_config import make_config

FOLDER = Path(tempfile.mkdtemp(prefix="zeg-fuzz-"))
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)
(FOLDER / "spool").mkdir()
GATEWAY = Gateway(make_config(FOLDER, timeout=0.2), Journal(FOLDER))
PATTERNS = (addresses.Pattern("", "mail.example.com"), addresses.Pattern("user+", "mail.example.com"))
FORMER, ALIASES = (addresses.Pattern("old", "x.org"),), {"a": address_book.Target("0" * 32, "#a")}
BOOKS = tuple(AddressBook(pattern, FORMER, ALIASES) for pattern in PATTERNS)
Target = Callable[[bytes], None]
# How long a server may say nothing (seconds): many do so, and no promise depends on it.
SILENCE = 0.05


def an_address(data: bytes) -> None:
    """Folded once, an address stays as it is, and no token is shown."""
    recipient = data.decode("utf-8", "surrogateescape")
    for pattern in PATTERNS:
        with suppress(addresses.NotAGatewayAddress, addresses.OtherPattern):
            found = addresses.parse(recipient, pattern)
            assert found.text == recipient.strip().lower() and addresses.parse(found.text, pattern) == found
            assert re.fullmatch("(mm)?[0-9a-f]{32}", found.token) and found.is_reply == found.token.startswith("mm")
            assert found.token not in addresses.redact(found.text)
    for book in BOOKS:
        book.token_of(recipient)


def a_policy_request(data: bytes) -> None:
    """Every answer is one that smtpd knows."""
    asked = policy.Policy(lambda: GATEWAY, lambda work: work() is None, lambda _: None)
    verdicts = (Delivered(), Deferred("4.3.2", "x", "x\n"), Refused("5.1.1", "unknown address", f"no {data[:99]!r}"))
    GATEWAY.knows = lambda _: verdicts[len(data) % 3]  # type: ignore[method-assign]
    said = conversation(asked.converse, data)
    assert re.fullmatch(rb"(action=(DUNNO|(550|552|450) [45](\.\d{1,3}){2} [\x20-\x7e]+)\n\n)*", said), said


def a_client_request(data: bytes) -> None:
    """Every answer has an exit status of sysexits(3) and a line."""
    made = service.Service(FOLDER / "gateway.conf")
    made.gateway = lambda: GATEWAY  # type: ignore[method-assign]
    said = conversation(made._serve_one, data)
    assert re.fullmatch(rb"(0|1|69|75) [^\n]+\n([^\n]*\n)?|", said), said


def a_service_answer(data: bytes) -> None:
    """A client makes a verdict of it, or says that there is none."""
    with suppress(submission.NoAnswer):
        status, line, details = submission._understood(data)
        assert 0 <= status <= 255 and "\n" not in line
        is_verdict(verdict.understood(status, line, details))


def an_http_answer(data: bytes) -> None:
    """Zulip refuses a mail by one answer only."""
    status = int.from_bytes(data[:1], "big") + 300 if data[:1] > b"\xc8" else (200, 400, 403, 500)[len(data) % 4]
    said = backend_http.interpret(status, data[1:])
    is_verdict(said)
    assert not isinstance(said, Refused) or (status == 400 and b"5." in data)
    assert not isinstance(said, Delivered) or (status == 200 and b"success" in data)


def an_http_server(data: bytes) -> None:
    """Whatever it sends in place of an answer."""

    def answer(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(data)

    with server(answer) as port:
        said = HttpBackend(f"http://127.0.0.1:{port}", "secret", SILENCE).hand_over("general@x", mail(b"m"), FOLDER)
    is_verdict(said)
    assert not isinstance(said, Delivered) or b"success" in data


def an_smtp_server(data: bytes) -> None:
    """Whatever it answers each command with."""

    def answer(connection: socket.socket) -> None:
        for piece in data.split(b"\0"):
            connection.sendall(piece)
            if not connection.recv(65536):
                return

    with server(answer) as port:
        said = SmtpBackend("127.0.0.1", port, SILENCE).hand_over("general@x", mail(b"m"), FOLDER)
    is_verdict(said)
    assert not isinstance(said, Delivered) or b"250" in data


def a_log(data: bytes) -> None:
    """No line tells of more than it says."""
    for line in worker_log._lines(data):
        assert line.kind in worker_log._KINDS and "\n" not in line.text and line.at == line.at
    with tempfile.NamedTemporaryFile(dir=FOLDER) as file:
        file.write(data)
        file.flush()
        worker_log._tail(Path(file.name))


def failed_mail(data: bytes) -> None:
    """Of a line of Zulip's file nothing is taken that does not stand there."""
    if not data:
        return
    with tempfile.TemporaryFile(dir=FOLDER) as file, tempfile.TemporaryFile(dir=FOLDER) as out:
        file.write(data)
        file.flush()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
            for failed in _mails(whole, 0, len(whole)):
                assert 0 <= failed.begin <= failed.end <= len(data)
                out.seek(0)
                out.truncate()
                _decode(whole, failed, out)
                assert out.tell() <= len(data)


def an_imap_header(data: bytes) -> None:
    """Whatever is found is an address of Zulip's grammar."""
    for book in BOOKS:
        for found in find_recipients(data, book):
            assert book.parse(found).text


def an_imap_server(data: bytes) -> None:
    """Whatever it answers each command with: the poller tells of it and tries again."""

    def answer(connection: socket.socket) -> None:
        with connection.makefile("rwb") as lines:
            for number, piece in enumerate(data.split(b"\0")):
                tag = lines.readline().partition(b" ")[0] if number else b"*"
                lines.write(piece.replace(b"TAG", tag))
                lines.flush()

    with server(answer) as port:
        imap = Imap("127.0.0.1", port, "none", "INBOX", "zulip", "", "", 1000, {"password": "x"})
        with suppress(Trouble), closing(ImapSession(imap, None, SILENCE)) as session:
            uids = session.uids()[:3]
            for seen in session.headers(uids).values():
                assert isinstance(seen.header, bytes) and seen.size >= 0
            for uid in uids:
                session.set_aside(uid, Copied())


class Copied(set[int]):
    """Which mails were copied, as inbox_notes.Notes."""

    was_copied = set.__contains__
    copied = set.add


def a_mail(data: bytes) -> None:
    """What is changed for Zulip keeps the rest, and can be sent."""
    whole, spool = mail(data), FOLDER / "spool"
    forged(whole)
    changed = postable(whole, spool)
    if changed is not whole:
        kept = text(changed)
        assert all(line in kept for line in _bodies(data)), "text is gone"
    cleaned = changed.without_reserved_fields(spool)
    assert email.message_from_bytes(text(cleaned))["X-RcptTo"] is None
    try:
        taken = enterable(cleaned, spool)
    except NeverAccepted as why:
        assert str(why)
        return
    with tempfile.TemporaryFile(dir=FOLDER) as wire:
        write_wire_format(taken.file(), wire)
        # A dot that is doubled does not count (RFC 5321, 4.5.3.1.6).
        lines = [line.removeprefix(b".") for line in text(Message(wire)).split(b"\r\n")]
        assert max(map(len, lines)) <= 998 and not any(b"\n" in line or b"\r" in line for line in lines)


def a_marked_mail(data: bytes) -> None:
    """Whatever Zulip takes for the text begins with the line."""
    try:
        made = text(marked(mail(data), "It is forged", FOLDER / "spool"))
    except Unsure:
        return
    first: dict[str, str] = {}
    for part in email.message_from_bytes(made, policy=email.policy.default).walk():
        kind = part.get_content_type()
        if kind in ("text/plain", "text/html") and kind not in first:
            payload = part.get_payload(decode=True)
            assert isinstance(payload, bytes)
            first[kind] = payload.decode(part.get_content_charset("us-ascii"), "ignore").strip()
    lines = {"text/plain": "**It is forged**", "text/html": "<p><b>It is forged</b></p>"}
    assert any(first.values())
    assert all(seen.startswith(lines[kind]) for kind, seen in first.items() if seen), first


def a_milter_client(data: bytes) -> None:
    """Every answer is one of the protocol's, and rejects by what smtpd knows."""
    asked = policy.Policy(lambda: GATEWAY, lambda work: work() is None, lambda _: None)
    said = conversation(lambda connection: milter.converse(connection, asked.reply_to_header, wants_body=True), data)
    answer = rb"\x00\x00\x00(\x0dO.{12}|\x01c|.y(550|450) [45](\.\d{1,3}){2} [\x20-\x7e]+\x00)"
    assert re.fullmatch(rb"(%s)*" % answer, said, re.DOTALL), said


def _bodies(data: bytes) -> list[bytes]:
    """Words that a mail cannot lose: not in what describes a part, which an attached mail gets anew."""
    body = data.replace(b"\r\n", b"\n").partition(b"\n\n")[2]
    return re.findall(rb"WORD\d+", re.sub(rb"(?i)(?<=[\r\n])content-[^\r\n]*([\r\n][ \t][^\r\n]*)*", b"", body))


def zulips_settings(data: bytes) -> None:
    """Values, or one sentence that says what is wrong with the file."""
    (FOLDER / "settings.py").write_bytes(data)
    with suppress(zulip_info.Unfit):
        zulip_info.check_settings(FOLDER / "settings.py")


def zulips_conf(data: bytes) -> None:
    """The same."""
    (FOLDER / "zulip.conf").write_bytes(data)
    with suppress(zulip_info.Unfit):
        zulip_info.url_of(zulip_info.conf_of(FOLDER / "zulip.conf"))
        zulip_info.classes_line(FOLDER / "zulip.conf")


def conversation(serve: Callable[[socket.socket], None], data: bytes) -> bytes:
    """What is answered to these bytes."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(5)
        said: list[bytes] = []
        # Read meanwhile: many answers to short questions fill the socket.
        threads = [
            threading.Thread(target=lambda: (_quietly(ours.sendall, data), ours.shutdown(socket.SHUT_WR))),
            threading.Thread(target=lambda: _quietly(said.extend, iter(lambda: ours.recv(65536), b""))),
        ]
        for thread in threads:
            thread.start()
        with suppress(OSError):
            serve(theirs)
        theirs.close()
        for thread in threads:
            thread.join()
        return b"".join(said)


def _quietly(work: Callable[[Any], object], argument: object) -> None:
    with suppress(OSError):
        work(argument)


@contextmanager
def server(answer: Callable[[socket.socket], None]) -> Iterator[int]:
    """One connection; its port."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def run() -> None:
            with suppress(OSError), listening.accept()[0] as connection:
                connection.settimeout(1)
                answer(connection)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield listening.getsockname()[1]
        with suppress(OSError):
            listening.shutdown(socket.SHUT_RDWR)
        thread.join()


def is_verdict(said: verdict.Verdict) -> None:
    """What Postfix is told is one line that means what it is to mean."""
    line, status = verdict.pipe_line(said), verdict.exit_status(said)
    assert line.isprintable() and len(line) <= 900, line
    if isinstance(said, Delivered):
        assert status == 0 and line.startswith("2.")
    elif isinstance(said, Refused):
        assert status == 69 and re.match(r"5\.\d+\.\d+ Zulip mail gateway: ", line), line
    else:
        assert status == 75


TARGETS: dict[str, Target] = {
    function.__name__: function
    for function in (
        *(an_address, a_policy_request, a_client_request, a_service_answer, an_http_answer, an_http_server),
        *(
            a_marked_mail,
            a_milter_client,
            an_smtp_server,
            a_log,
            failed_mail,
            an_imap_header,
            an_imap_server,
            a_mail,
            zulips_settings,
            zulips_conf,
        ),
    )
}
