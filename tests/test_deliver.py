"""The command that Postfix runs: thin, and whatever the service does, the mail is only deferred."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from email_gateway import deliver, service, submission, verdict
from mails import eventually
from test_addresses import TOKEN

PACKAGE = Path(deliver.__file__).parents[1]
CHANNEL = f"general.{TOKEN}@mail.example.com"
LINE = f"Delivered-To: {CHANNEL}\n".encode()
SERVED = Callable[[socket.socket], None]


def command_in(folder: Path) -> list[str]:
    """The command as pipe(8) runs it, with its socket and its spool in `folder`."""
    start = (
        "import sys; sys.path.insert(0, sys.argv[1]); from email_gateway.deliver import main; "
        "main(sys.argv[4:], sys.argv[2], sys.argv[3])"
    )
    return [sys.executable, "-IS", "-c", start, str(PACKAGE), str(folder / "submit"), str(folder), "deliver"]


def run(folder: Path, *arguments: str | bytes, message: bytes | None = LINE + b"the mail", **options: object):
    """One line and an exit status."""
    command = [*command_in(folder), *arguments]
    return subprocess.run(command, input=message, capture_output=True, check=False, timeout=20, **options)


@pytest.fixture
def serve(tmp_path):
    """A service that does what it is told; what it was asked."""
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(tmp_path / "submit"))
    listening.listen()
    asked: list[tuple[str, dict[str, str], bytes]] = []
    threads: list[threading.Thread] = []

    def start(*turns: SERVED) -> list[tuple[str, dict[str, str], bytes]]:
        def work() -> None:
            for turn in turns:
                with suppress(OSError), listening.accept()[0] as connection:
                    verb, fields, descriptor = service._request(connection)
                    assert descriptor is not None
                    asked.append((verb, fields, os.pread(descriptor, 2**20, 0)))
                    os.close(descriptor)
                    turn(connection)

        threads.append(threading.Thread(target=work, daemon=True))
        threads[-1].start()
        return asked

    yield start
    listening.shutdown(socket.SHUT_RDWR)
    for thread in threads:  # then none of them listens to what comes after this socket
        thread.join(10)
    listening.close()


def says(answer: str) -> SERVED:
    return lambda connection: connection.sendall(answer.encode())


def hangs_up(_: socket.socket) -> None:
    pass


def hangs(connection: socket.socket) -> None:
    connection.recv(1)  # until nobody waits any more


def test_the_envelope_and_the_message_arrive(serve, tmp_path):
    asked = serve(says("0 2.0.0 accepted by Zulip\naccepted\n"))
    envelope = b"Return-Path: <user@example.org>\nX-Original-To: o@x\nDelivered-To: -odd@x\n"
    done = run(tmp_path, "--queue-id", "4gQ", "--deadline=9", message=envelope + b"\xff\0mail\r\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"2.0.0 accepted by Zulip\n", b"")
    fields = {"recipient": "-odd@x", "sender": "user@example.org", "queue-id": "4gQ", "original-recipient": "o@x"}
    assert asked == [("deliver", fields, b"\xff\0mail\r\n")]
    assert [path.name for path in tmp_path.iterdir()] == ["submit"]  # nothing is left of it


def test_a_large_message_arrives(serve, tmp_path):
    asked = serve(says("0 2.0.0 ok\naccepted\n"))
    content = os.urandom(2**19) * 2
    assert run(tmp_path, message=LINE + content).returncode == 0
    assert asked[0][2] == content


def test_from_a_file(serve, tmp_path):
    """As an operator may call it by hand."""
    asked = serve(says("0 2.0.0 ok\naccepted\n"))
    content = os.urandom(10_000)
    (tmp_path / "mail").write_bytes(LINE + content)
    with open(tmp_path / "mail", "rb") as file:
        assert run(tmp_path, message=None, stdin=file).returncode == 0
    assert asked[0][1:] == ({"recipient": CHANNEL}, content)


def test_an_8_bit_sender_arrives_as_it_is(serve, tmp_path):
    asked = serve(says("0 2.0.0 ok\naccepted\n"))
    assert run(tmp_path, message=b"Return-Path: <j\xf6rg@example.org>\n" + LINE).returncode == 0
    assert asked[0][1]["sender"] == "j\\xf6rg@example.org"


@pytest.mark.parametrize(
    ("answer", "status", "line"),
    [
        ("69 5.1.1 Zulip mail gateway: no\nunknown address\n", 69, b"5.1.1 Zulip mail gateway: no\n"),
        ("75 4.7.28 later\nrate limit\n", 75, b"4.7.28 later\n"),
    ],
)
def test_the_services_answer_is_passed_on(serve, tmp_path, answer, status, line):
    serve(says(answer))
    done = run(tmp_path)
    assert (done.returncode, done.stdout) == (status, line)


@pytest.mark.parametrize(
    ("turn", "words"),
    [
        (says("what?\n"), b"the service answers b'what?\\n'"),
        (says("0 2.0.0 half an ans"), b"the service answers b'0 2.0.0 half an ans'"),
        (says("256 5.0.0 x\n"), b"the service answers"),
        (says("-1 5.0.0 x\n"), b"the service answers"),
        (says("0 \n"), b"the service answers"),
        (says("\n"), b"the service answers"),
        (says("69"), b"the service answers"),
        (says("\xff\xfe 5.1.1\n"), b"the service answers"),
        (hangs, b"the service did not answer within 1 s"),
    ],
)
def test_garbage_and_silence_defer(serve, tmp_path, turn, words):
    serve(turn)
    done = run(tmp_path, "--deadline=1")
    assert done.returncode == 75 and done.stdout.startswith(b"4.3.2 ") and words in done.stdout
    assert done.stdout.count(b"\n") == 1 and b"systemctl status zulip-email-gateway" in done.stdout


def test_a_service_that_is_restarted_is_asked_again(serve, tmp_path):
    asked = serve(hangs_up, hangs_up, says("0 2.0.0 ok\naccepted\n"))
    assert run(tmp_path).returncode == 0
    assert len(asked) == 3 and asked[0] == asked[2]


def test_a_service_that_dies_every_time_defers(serve, tmp_path, monkeypatch):
    serve(*[hangs_up] * 9)
    done = run(tmp_path)
    assert done.returncode == 75 and b"the service ends without an answer" in done.stdout


def test_no_service_defers(tmp_path):
    done = run(tmp_path)
    assert done.returncode == 75 and b"cannot be reached at " in done.stdout and b"No such file" in done.stdout
    with socket.socket(socket.AF_UNIX) as nobody:
        nobody.bind(str(tmp_path / "submit"))
        done = run(tmp_path)
    assert done.returncode == 75 and b"Connection refused" in done.stdout


def test_no_room_for_the_message_defers(tmp_path):
    done = run(tmp_path / "missing")
    assert done.returncode == 75 and done.stdout.startswith(b"4.3.0 cannot store the message in ")


@pytest.mark.parametrize("arguments", [("--", CHANNEL), (CHANNEL,), ("--what=x",), ("--deadline=x",)])
def test_what_makes_no_sense_defers(serve, tmp_path, arguments):
    """A bad master.cf, or one of an earlier version, is not the mail's fault."""
    asked = serve(says("0 2.0.0 ok\naccepted\n"))
    done = run(tmp_path, *arguments)
    assert done.returncode == 75 and done.stdout.startswith(b"4.3.") and done.stdout.count(b"\n") == 1
    assert asked == []


@pytest.mark.parametrize("message", [b"", b"Subject: x\n\nDelivered-To: a@x\n", LINE[:-1], b"\n" + LINE, b"x" * 9000])
def test_without_a_recipient_it_defers(serve, tmp_path, message):
    asked = serve(says("0 2.0.0 ok\naccepted\n"))
    done = run(tmp_path, message=message)
    assert done.returncode == 75 and b"deliver wants a line 'Delivered-To: ' with the recipient" in done.stdout
    assert asked == []


def test_what_comes_behind_is_the_mails(serve, tmp_path):
    asked = serve(says("0 2.0.0 ok\naccepted\n"))
    fields = b"Delivered-To: another@x\nReturn-Path: <another@x>\nX-Original-To: another@x\n\n"
    assert run(tmp_path, message=b"Return-Path: <>\n" + LINE + fields).returncode == 0
    assert asked == [("deliver", {"sender": "", "recipient": CHANNEL}, fields)]


def test_a_line_end_in_the_envelope_starts_no_other_request(tmp_path):
    done = run(tmp_path, "--queue-id=x\ny")
    assert done.returncode == 75 and b"a line end or a NUL in the envelope" in done.stdout


def test_half_a_mail_is_not_delivered(serve, tmp_path):
    """pipe(8) is killed while it writes: what has come is all there is, and looks complete."""
    asked = serve(says("0 2.0.0 ok\naccepted\n"))
    shown = tmp_path / "shown"
    command = [*command_in(tmp_path), "--queue-id=Q"]
    parent = f"""
import os, subprocess
child = subprocess.Popen({command!r}, stdin=subprocess.PIPE, stdout=open({str(shown)!r}, "w"))
child.stdin.write({LINE!r} + b"x" * 300000)
child.stdin.flush()
os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", parent], check=False)
    assert eventually(shown.read_text)
    assert shown.read_text() == "4.3.2 Postfix was stopped while it passed the mail on\n" and asked == []


def test_it_imports_next_to_nothing(tmp_path):
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); before = set(sys.modules); "
        "import email_gateway.deliver; print(sorted(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-IS", "-c", script, str(PACKAGE)], capture_output=True, text=True, check=True
    )
    allowed = {"__future__", "_socket", "time", "posix", "email_gateway", "email_gateway.deliver"}
    assert set(eval(done.stdout)) <= allowed | {"email_gateway.submission"}


def test_help_is_shown(tmp_path):
    done = run(tmp_path, "--help")
    assert done.returncode == 0 and b"Delivered-To: ADDRESS" in done.stdout


def test_the_exit_status_is_the_verdicts():
    assert submission.EX_TEMPFAIL == verdict.EX_TEMPFAIL
