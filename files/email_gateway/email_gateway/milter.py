"""What Postfix shows before it accepts a mail: its header, for each recipient that it has let through.

The milter protocol, as far as that needs it (Postfix's MILTER_README; sendmail's include/libmilter/mfdef.h): each
packet has its length (4 octets), a command (1) and data. Nothing of a mail is changed here. What milters before
this one have added stands in the header.
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
_OPTIONS, _MAIL, _RECIPIENT, _HEADER, _BODY, _ENDS = b"O", b"M", b"R", b"L", b"B", b"E"
_ABORTED, _LEAVES = b"A", b"Q"
_CONTINUE, _REPLY = b"c", b"y"
# What is not to be sent: the client, HELO, the header's end, DATA, and what is unknown; the body unless it is wanted.
_LEFT_OUT, _NO_BODY = 0x01 | 0x02 | 0x40 | 0x100 | 0x200, 0x10
# What gets no answer: the lines of the header, the sender, a recipient, and pieces of the body.
_NOT_ANSWERED = 0x80 | 0x4000 | 0x8000 | 0x80000
_VERSION = 6
# A packet is a line of a header, or less; of a header so much is looked at (octets).
_MOST, _MOST_OF_HEADER = 2**20, 2**18
_MOST_RECIPIENTS = 10_000
# A mail that has more fields is made to keep us busy. What is not answered Postfix decides by itself.
_MOST_FIELDS = 10_000


class _Mail:
    """A mail that is coming in."""

    def __init__(self, sender: str = "") -> None:
        self.sender = sender
        self.recipients: list[str] = []
        self.header, self.fields = bytearray(), 0
        self.dashes, self._last = 0, b""

    def count(self, piece: bytes) -> None:
        """Count the lines of the body that begin with two dashes, as those between parts do."""
        text = self._last + piece
        self.dashes += text.count(b"\n--")
        self._last = text[-2:]


def converse(
    connection: socket.socket, decide: Callable[[str, list[str], Message, int], str], wants_body: bool
) -> None:
    """Answer one smtpd until it leaves. decide: is given the sender, the recipients, the header and the number
    of lines that begin with two dashes, and says the SMTP reply that rejects the mail, or nothing. Raises OSError,
    also where no milter's client talks."""
    mail = _Mail()
    with connection.makefile("rb") as stream:
        while True:
            command, data = _packet(stream.read(4), stream.read)
            if command in (b"", _LEAVES):
                return
            if command == _OPTIONS:
                connection.sendall(_answer(_OPTIONS, _agreed(data, 0 if wants_body else _NO_BODY)))
            elif command == _MAIL:
                mail = _Mail(_address(data))
            elif command == _RECIPIENT and len(mail.recipients) < _MOST_RECIPIENTS:
                mail.recipients.append(_address(data))
            elif command == _HEADER:
                mail.fields += 1
                if mail.fields > _MOST_FIELDS:
                    raise OSError("a header without end")
                if len(mail.header) < _MOST_OF_HEADER:
                    name, _, value = data.partition(b"\0")
                    mail.header += name + b": " + value.rstrip(b"\0") + b"\n"
            elif command == _BODY:
                mail.count(data)
            elif command == _ENDS:
                connection.sendall(_decided(mail, decide))
            elif command == _ABORTED:
                mail = _Mail()


def _decided(mail: _Mail, decide: Callable[[str, list[str], Message, int], str]) -> bytes:
    with tempfile.TemporaryFile() as file:
        file.write(mail.header + b"\n")
        file.flush()
        reply = decide(mail.sender, mail.recipients, Message(file), mail.dashes)
    # A per cent sign is written twice.
    text = reply.encode("ascii", "replace").replace(b"%", b"%%")
    return _answer(_REPLY, text + b"\0") if reply else _answer(_CONTINUE)


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


def _agreed(offered: bytes, body: int) -> bytes:
    """Version, what is done to mail (nothing), and what is not to be sent or gets no answer."""
    if len(offered) < 12:
        raise OSError("not a milter's packet")
    version, _, protocol = struct.unpack(">III", offered[:12])
    wanted = _LEFT_OUT | _NOT_ANSWERED | body
    if protocol & wanted != wanted:
        raise OSError("this milter needs a later Postfix")
    return struct.pack(">III", min(version, _VERSION), 0, wanted)


def _address(data: bytes) -> str:
    """The first argument, an address, without what RFC 5321 puts around it."""
    address = data.partition(b"\0")[0].decode("utf-8", "backslashreplace")
    return address.removeprefix("<").removesuffix(">")
