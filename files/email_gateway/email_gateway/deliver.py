"""The command that Postfix's pipe(8) runs for every mail: stores it, asks the service.

Before the mail come lines with its envelope, ``Delivered-To: ADDRESS`` the last of them (pipe(8),
flags=DOR): whoever has an address may post, and every user of the host may read a program's arguments.

It prints the service's line and ends with its exit status. Whatever else happens, the
mail is deferred and the line says why: pipe(8) bounces on most exit statuses, and takes
output that begins with an enhanced status code (RFC 3463) before the exit status.
"""

from __future__ import annotations

import posix

from .submission import EX_TEMPFAIL, SOCKET, SPOOL, NoAnswer, ask

_HINT = "look at: systemctl status zulip-email-gateway"
# Seconds to wait for the service by hand; it answers sooner unless it hangs. Postfix gives its own.
_DEADLINE = 300.0
_OPTIONS = ("queue-id", "deadline")
_PIECE = 2**20
# In the order in which pipe(8) writes them; all but the recipient may be missing.
_ENVELOPE = {b"Return-Path: ": "sender", b"X-Original-To: ": "original-recipient", b"Delivered-To: ": "recipient"}
_MAX_ENVELOPE = 2**14
# proc(5), /proc/PID/stat: field 9, of which include/linux/sched.h knows the bits.
_FLAGS, _PF_EXITING = 8, 0x4


def main(arguments: list[str], socket: str = SOCKET, spool: str = SPOOL) -> int:
    """Deliver the mail on standard input; never returns unless help is wanted.

    arguments: as from the command line, "deliver" first.
    """
    if "--help" in arguments or "-h" in arguments:
        from .cli import main as show_help

        return show_help(arguments)
    try:
        status, line = _deliver(arguments[1:], socket, spool)
    except NoAnswer as trouble:
        status, line = EX_TEMPFAIL, f"4.3.2 {trouble}; {_HINT}"
    except BaseException as error:  # our own bug must delay a mail, never bounce it
        status, line = EX_TEMPFAIL, f"4.3.0 error in the gateway itself, please report it: {error!r}"
    posix.write(1, line.replace("\n", " ").encode("utf-8", "replace") + b"\n")
    posix._exit(status)


def _deliver(arguments: list[str], socket: str, spool: str) -> tuple[int, str]:
    options = _parse(arguments)
    parent = posix.getppid()
    try:
        envelope, descriptor = _store(spool)
    except OSError as error:
        return EX_TEMPFAIL, f"4.3.0 cannot store the message in {spool}: {error.strerror}"
    # In this order: what cannot be looked at because it is gone has another parent by then. That of
    # the very first question may be init already: pipe(8) is never the first process.
    if _is_ending(parent) or posix.getppid() != parent or (parent == 1 and "queue-id" in options):
        # Postfix was stopped: what has come may be half of a mail, which it still has.
        return EX_TEMPFAIL, "4.3.2 Postfix was stopped while it passed the mail on"
    if "recipient" not in envelope:
        raise NoAnswer("deliver wants a line 'Delivered-To: ' with the recipient before the mail")
    fields = ["deliver", *(f"{name}={value}" for name, value in envelope.items())]
    fields += [f"{name}={value}" for name, value in options.items() if name != "deadline"]
    status, line, _ = ask(fields, descriptor, float(options.get("deadline") or _DEADLINE), socket)
    return status, line


def _parse(arguments: list[str]) -> dict[str, str]:
    """The options; raises NoAnswer for anything else."""
    options: dict[str, str] = {}
    words = iter(arguments)
    for word in words:
        name, is_joined, value = word[2:].partition("=")
        if not word.startswith("--") or name not in _OPTIONS:
            raise NoAnswer(f"deliver knows {', '.join('--' + one for one in _OPTIONS)} and nothing else")
        options[name] = value if is_joined else next(words, "")
    return options


def _store(spool: str) -> tuple[dict[str, str], int]:
    """The envelope, and the mail: an open file that has no name and goes when it is closed."""
    name = f"{spool}/{posix.urandom(8).hex()}"
    descriptor = posix.open(name, posix.O_RDWR | posix.O_CREAT | posix.O_EXCL | posix.O_CLOEXEC, 0o600)
    posix.unlink(name)
    envelope: dict[str, str] = {}
    head = b""
    for field, name in _ENVELOPE.items():
        while b"\n" not in head and len(head) < _MAX_ENVELOPE and (piece := posix.read(0, _MAX_ENVELOPE)):
            head += piece
        if head.startswith(field) and b"\n" in head:
            line, _, head = head[len(field) :].partition(b"\n")
            envelope[name] = line.strip().decode("utf-8", "surrogateescape")
    if envelope.get("sender", "")[:1] == "<":
        envelope["sender"] = envelope["sender"][1:-1]
    while head:
        head = head[posix.write(descriptor, head) :]
    try:
        while posix.splice(0, descriptor, _PIECE):  # the message never comes into our memory
            pass
    except OSError as error:
        if error.errno != 22:  # EINVAL: standard input is no pipe, but a file, by hand
            raise
        while piece := posix.read(0, _PIECE):
            while piece:
                piece = piece[posix.write(descriptor, piece) :]
    return envelope, descriptor


def _is_ending(process: int) -> bool:
    """True if the process has begun to end: it closes its pipe before it is gone."""
    try:
        with open(f"/proc/{process}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return False
    return bool(int(fields[_FLAGS - 2]) & _PF_EXITING)
