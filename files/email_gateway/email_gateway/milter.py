"""What Postfix shows before it accepts a mail: its header, for each recipient that it has let through.

The milter protocol, as far as that needs it (Postfix's MILTER_README; sendmail's include/libmilter/mfdef.h): each
packet has its length (4 octets), a command (1) and data. Nothing of a mail is changed here, and its
body is not asked for. Other milters of the same Postfix have had their say, and are seen in the header.
"""

from __future__ import annotations

import socket
import struct
import tempfile
from collections.abc import Callable

from .message import Message

# How the first packet begins, which no other request does.
FIRST = b"\0"

# Commands, and answers.
_OPTIONS, _MAIL, _RECIPIENT, _HEADER, _HEADER_ENDS, _ENDS = b"O", b"M", b"R", b"L", b"N", b"E"
_ABORTED, _LEAVES = b"A", b"Q"
_CONTINUE, _REPLY = b"c", b"y"
# What is not to be sent: the client, HELO, DATA, the body and what is unknown; and what gets no answer.
_LEFT_OUT = 0x01 | 0x02 | 0x10 | 0x100 | 0x200
_NOT_ANSWERED = 0x80 | 0x4000 | 0x8000
_VERSION = 6
# A packet is a line of a header, or less; of a header so much is looked at (octets).
_MOST, _MOST_OF_HEADER = 2**20, 2**18
_MOST_RECIPIENTS = 10_000


class _Mail:
    """A mail that is coming in."""

    def __init__(self, sender: str = "") -> None:
        self.sender = sender
        self.recipients: list[str] = []
        self.header = bytearray()


def converse(connection: socket.socket, decide: Callable[[str, list[str], Message], str]) -> None:
    """Answer one smtpd until it leaves. decide: is given the sender, the recipients and the header, and says the
    SMTP reply that rejects the mail, or nothing. Raises OSError, also where no milter's client talks."""
    mail = _Mail()
    with connection.makefile("rb") as stream:
        while True:
            command, data = _packet(stream.read(4), stream.read)
            if command in (b"", _LEAVES):
                return
            if command == _OPTIONS:
                connection.sendall(_answer(_OPTIONS, _agreed(data)))
            elif command == _MAIL:
                mail = _Mail(_address(data))
            elif command == _RECIPIENT and len(mail.recipients) < _MOST_RECIPIENTS:
                mail.recipients.append(_address(data))
            elif command == _HEADER and len(mail.header) < _MOST_OF_HEADER:
                name, _, value = data.partition(b"\0")
                mail.header += name + b": " + value.rstrip(b"\0") + b"\n"
            elif command == _HEADER_ENDS:
                with tempfile.TemporaryFile() as file:
                    file.write(mail.header + b"\n")
                    file.flush()
                    reply = decide(mail.sender, mail.recipients, Message(file)).encode("ascii", "replace")
                # A per cent sign is written twice.
                connection.sendall(_answer(_REPLY, reply.replace(b"%", b"%%") + b"\0") if reply else _answer(_CONTINUE))
            elif command == _ENDS:
                connection.sendall(_answer(_CONTINUE))
            elif command == _ABORTED:
                mail = _Mail()


def _packet(length: bytes, read: Callable[[int], bytes]) -> tuple[bytes, bytes]:
    """A command and its data; an empty one where nothing more comes."""
    if len(length) < 4:
        return b"", b""
    size = struct.unpack(">I", length)[0]
    if not 0 < size <= _MOST:
        raise OSError("not a milter's packet")
    packet = read(size)
    return (packet[:1], packet[1:]) if len(packet) == size else (b"", b"")


def _answer(command: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", 1 + len(data)) + command + data


def _agreed(offered: bytes) -> bytes:
    """Version, what is done to mail (nothing), and what is not to be sent or gets no answer."""
    if len(offered) < 12:
        raise OSError("not a milter's packet")
    version, _, protocol = struct.unpack(">III", offered[:12])
    wanted = _LEFT_OUT | _NOT_ANSWERED
    if protocol & wanted != wanted:
        raise OSError("this milter needs a later Postfix")
    return struct.pack(">III", min(version, _VERSION), 0, wanted)


def _address(data: bytes) -> str:
    """The first argument, an address, without what RFC 5321 puts around it."""
    address = data.partition(b"\0")[0].decode("utf-8", "backslashreplace")
    return address.removeprefix("<").removesuffix(">")
