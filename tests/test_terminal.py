"""What strangers have written cannot steer the terminal of who looks at it."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from email_gateway import cli
from email_gateway.gateway import Envelope
from email_gateway.terminal import escaped, readable
from email_gateway.verdict import Refused
from mails import mail
from test_config import rendered, write_addresses

PACKAGE = Path(cli.__file__).parents[1]
MESSAGE = b"Subject: \x1b]0;x\x07\r\n\r\n\x9b2J \xe2\x80\xae gr\xc3\xbc\xc3\x9fe\n\ttab \x00 \xff\n"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("grüße 日本語\n\tx", "grüße 日本語\n\tx"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\rb\x07\x08\x9b\x7f", "a\\rb\\x07\\x08\\x9b\\x7f"),
        ("\u202egpj.exe\u2066", "\\u202egpj.exe\\u2066"),
        ("\udcff", "\\udcff"),
    ],
)
def test_unprintable_characters_are_escaped(text, shown):
    assert escaped(text) == shown


def test_a_message_is_readable_however_it_comes_in_pieces():
    whole = "".join(readable([MESSAGE]))
    assert whole == "Subject: \\x1b]0;x\\x07\n\n\\x9b2J \\u202e grüße\n\ttab \\x00 \\xff\n"
    pieces = [MESSAGE[place : place + 1] for place in range(len(MESSAGE))]
    assert "".join(readable(pieces)).replace("\\r\n", "\n") == whole


@pytest.fixture
def show(gateway, tmp_path):
    """The command that shows a refused mail."""
    gateway.answers = [Refused("5.1.1", "unknown address", "no \x1b[2J")]
    recipient = f"general.{'a' * 32}@mail.example.com"
    gateway.deliver(Envelope(recipient, "\x1b]0;sender\x07@example.org", ""), mail(MESSAGE))
    configuration = tmp_path / "gateway.conf"
    configuration.write_text(rendered(tmp_path))
    write_addresses(tmp_path)
    [copy] = gateway.journal.copies()
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); from email_gateway.cli import main; sys.exit(main(sys.argv[2:]))"
    )
    command = [sys.executable, "-c", program, str(PACKAGE), "--config", str(configuration), "quarantine"]
    return [*command, "show", copy.id]


def test_into_a_pipe_goes_the_message_as_it_came(show):
    done = subprocess.run(show, capture_output=True, check=True)
    assert done.stdout == MESSAGE
    assert b"sender: \\x1b]0;sender\\x07@example.org\n" in done.stderr and b"\x1b" not in done.stderr


def test_a_terminal_gets_it_escaped(show):
    ours, theirs = pty.openpty()
    with subprocess.Popen(show, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        try:
            while piece := os.read(ours, 65536):
                shown += piece
        except OSError:  # it has ended
            pass
        assert process.wait() == 0
    assert b"Subject: \\x1b]0;x\\x07\r\n" in shown and b"reason: no " in shown
    assert not set(shown) & {0x1B, 0x07, 0x00, 0x9B}


def test_nor_does_the_list_steer_it(show):
    done = subprocess.run([*show[:-2], "list"], capture_output=True, check=True)
    assert b"\x1b" not in done.stdout and done.stdout.count(b"\n") == 1
