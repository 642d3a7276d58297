"""How the other processes talk to the service (service.py): one request, one answer.

A request is a line of NUL-separated fields, ``verb NUL name=value ...`` and LF; the
message comes with it as an open file (SCM_RIGHTS, unix(7)), so that nobody holds or
copies it. The answer is a line with an exit status and a text, and perhaps a line of
details; then the service closes the connection.

Postfix starts a program with this module for every mail: it imports next to nothing.
"""

from __future__ import annotations

import sys
import time
from _socket import AF_UNIX, SCM_RIGHTS, SOCK_CLOEXEC, SOCK_STREAM, SOL_SOCKET
from _socket import socket as Socket

SOCKET = "/run/zulip-email-gateway/submit"
# Where a message is stored while it is handed over, below the gateway's state.
SPOOL = "/var/lib/zulip-email-gateway/spool"
# sysexits(3): the mail stays where it is. All else is the service's to say (verdict.py).
EX_TEMPFAIL = 75
# A service that is being restarted or was killed is asked again this often.
_TRIES = 5
_PAUSE = 0.5
_MAX_ANSWER = 2**24


class NoAnswer(Exception):
    """The service cannot be asked or gives no answer; says why."""


def ask(fields: list[str], descriptor: int | None, seconds: float, path: str = SOCKET) -> tuple[int, str, str]:
    """Ask the service; its exit status, its line, and its details.

    fields: the verb, then name=value. descriptor: the message, an open file.
    seconds: how long to wait for the answer. Raises NoAnswer.
    """
    request = "\0".join(fields).encode("utf-8", "surrogateescape") + b"\n"
    if request.count(b"\n") > 1 or any("\0" in field for field in fields):
        raise NoAnswer("a line end or a NUL in the envelope")
    end = time.monotonic() + seconds
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(_PAUSE)
        answer = _exchange(request, descriptor, end, seconds, path)
        if answer:
            return _understood(answer)
    raise NoAnswer("the service ends without an answer")


def _exchange(request: bytes, descriptor: int | None, end: float, seconds: float, path: str) -> bytes:
    """One connection; empty if the service ended before it answered."""
    connection = Socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC)
    answer = b""
    try:
        connection.settimeout(max(0.001, end - time.monotonic()))
        connection.connect(path)
        rights = [] if descriptor is None else [(SOL_SOCKET, SCM_RIGHTS, descriptor.to_bytes(4, sys.byteorder))]
        sent = connection.sendmsg([request], rights)
        if sent < len(request):
            connection.sendall(request[sent:])
        while len(answer) < _MAX_ANSWER:
            connection.settimeout(max(0.001, end - time.monotonic()))
            piece = connection.recv(65536)
            if not piece:
                return answer
            answer += piece
    except TimeoutError:
        raise NoAnswer(f"the service did not answer within {seconds:g} s") from None
    except (ConnectionResetError, BrokenPipeError):
        return b""
    except OSError as error:
        raise NoAnswer(f"the service cannot be reached at {path}: {error.strerror}") from error
    finally:
        connection.close()
    raise NoAnswer("the service answers without end")


def _understood(answer: bytes) -> tuple[int, str, str]:
    lines = answer.decode("utf-8", "replace").split("\n")
    status, _, line = lines[0].partition(" ")
    if len(lines) < 2 or lines[-1] or not status.isdigit() or int(status) > 255 or not line:
        raise NoAnswer(f"the service answers {answer[:60]!r}")
    return int(status), line, "\n".join(lines[1:-1])
