"""The one resident process: takes mail at its socket and hands it to Zulip.

systemd listens at the socket (systemd.socket(5)) and starts the service with it, so a
client waits while the service is restarted. Each request (submission.py) has a thread of
its own; what they share is the journal and the pacing. Asked to end, the service answers
all it has begun first.
"""

from __future__ import annotations

import os
import select
import signal
import smtplib
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from . import certificate, config, late, migration, milter, policy, postfix, revival
from .address_book import stale
from .addresses import redact
from .alerts import Alerts
from .backend import prove
from .failures import Failures
from .gateway import SPOOL, Envelope, Gateway
from .journal import UNDELIVERABLE, Journal, add_to_count, address_of, key_of
from .message import Message
from .policy import Policy
from .verdict import (
    DROPPED,
    STOPPING,
    Deferred,
    Delivered,
    Refused,
    Trouble,
    Verdict,
    answer,
    bug,
    exit_status,
    one_line,
)
from .watchdog import notify, watchdog_seconds

# Look this often (seconds) for what failed inside Zulip, and for what there is to tidy.
_TICK, _TIDY = 5.0, 60.0
# What Zulip does not take again now is tried again after this time, then twice as long (seconds).
_FIRST_PAUSE, _LONGEST_PAUSE = 60.0, 900.0
# A request is a line of this many bytes at most, and has to come within so many seconds.
_MAX_REQUEST, _REQUEST_TIMEOUT = 2**24, 30.0
# sd_listen_fds(3): the first descriptor that systemd passes.
_FIRST_DESCRIPTOR = 3
# The sockets' names: of their units (systemd.socket(5), FileDescriptorName=).
SUBMIT, POLICY = "zulip-email-gateway.socket", "zulip-email-gateway-policy.socket"
# What still has a name in the spool after this time (seconds), nobody is using.
_LEFT_OVER = 600.0
# The longest line that is told (characters).
_LONGEST_LINE = 2000
# An operator waits so long (seconds) for Zulip's rate limit.
_MAX_WAIT = 30.0
# Postfix sends the whole header of a refused mail back. One of more bytes is nobody's mail, and
# stays in quarantine without a notice to its sender, who is forged as a rule.
_MOST_RETURNED = 2**18
# An address that Zulip has known is known so long, for who wants to be sure (seconds).
_FRESH = 86400.0
# So often it is seen whether there is anything to tell the operator, and which certificate is shown (seconds).
_ALERTED, _HOUR = 60.0, 3600.0
# A thread needs little, and there may be many.
_STACK = 2**19

Fields = dict[str, str]


class Service:
    """Answers requests; `configuration` is gateway.conf, read anew when it has changed."""

    def __init__(self, configuration: Path) -> None:
        self._configuration = configuration
        self._lock = threading.Lock()
        self._gateway: Gateway | None = None
        self._journal: Journal | None = None
        self._read: tuple[object, ...] = ()
        self._stopping = threading.Event()
        self._threads: set[threading.Thread] = set()
        self._policy = Policy(self.gateway, self._begin, say)
        # The connections of smtpd.
        self._asking: set[socket.socket] = set()

    def gateway(self) -> Gateway:
        """The gateway as configured now; raises Trouble."""
        with self._lock:
            stamps = _stamp(self._configuration), _stamp(self._configuration.with_name(config.ADDRESSES))
            if self._gateway is not None and self._read == (*stamps, _stamp(self._gateway.config.credential)):
                return self._gateway
            loaded = config.load(self._configuration)
            fresh = _opened(loaded) if self._journal is None else Gateway(loaded, self._journal)
            self._journal = fresh.journal
            fresh.stopping = self._stopping
            if self._gateway is not None:
                self._gateway.close()
                fresh.succeed(self._gateway)
            self._gateway = fresh
            self._read = (*stamps, _stamp(loaded.credential))
            return self._gateway

    def serve(self, submit: socket.socket, asked: socket.socket | None = None) -> None:
        """Answer until SIGTERM; then finish what was begun. asked: by smtpd."""
        threading.stack_size(_STACK)
        signal.signal(signal.SIGTERM, lambda *_: self._stopping.set())
        wake, woken = socket.socketpair()
        listeners = {submit: self._serve_one, **({asked: self._serve_smtpd} if asked else {})}
        for end in (wake, woken, *listeners):
            end.setblocking(False)
        signal.set_wakeup_fd(woken.fileno())
        try:
            self.gateway()  # the journal, and the folder that clients store mail in
        except Exception as error:  # each request is told, and the next one may find it mended
            say(str(error))
        self._begin(self._in_the_background)
        notify("READY=1")
        poll = select.poll()
        for end in (wake, *listeners):
            poll.register(end, select.POLLIN)
        beat, shown = watchdog_seconds(), 0.0
        while not self._stopping.is_set():
            poll.poll(beat * 1000 if beat else None)
            if beat and time.monotonic() - shown >= beat / 2 and self._is_alive():
                notify("WATCHDOG=1")
                shown = time.monotonic()
            for listener, work in listeners.items():
                self._accept(listener, work)
        notify("STOPPING=1")
        for listener in listeners:
            listener.close()
        for connection in list(self._asking):
            policy.end(connection)
        for thread in list(self._threads):
            thread.join()
        if self._gateway is not None:
            self._gateway.close()
            with suppress(Trouble):
                self._gateway.outcomes.keep()
        if self._journal is not None:
            with suppress(Trouble):
                self._policy.tidy(self._journal)
            self._policy.close()
            self._journal.close()

    def _accept(self, listener: socket.socket, work: Callable[[socket.socket], None]) -> None:
        try:
            connection, _ = listener.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError as error:  # no descriptor is left, for example
            say(f"cannot take a request: {error.strerror}")
            time.sleep(1)
            return
        self._begin(work, connection)

    def _is_alive(self) -> bool:
        """True if the journal can be had: no thread keeps it for ever."""
        return self._journal is None or self._journal.is_free(1.0)

    def _begin(self, work: Callable[..., None], *arguments: Any) -> bool:
        """Start a thread; False if there is no room for one."""

        def run() -> None:
            try:
                work(*arguments)
            finally:
                self._threads.discard(threading.current_thread())

        thread = threading.Thread(target=run, daemon=True)
        self._threads.add(thread)
        try:
            thread.start()
        except RuntimeError:  # no memory for one more: the client tries again
            self._threads.discard(thread)
            for argument in arguments:
                argument.close()
            return False
        return True

    def _serve_one(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.setblocking(True)
            connection.settimeout(_REQUEST_TIMEOUT)
            verb, fields, descriptor = _request(connection)
            try:
                said = self._answer(verb, fields, descriptor)
            except Trouble as trouble:
                said = answer(trouble.verdict)
            except Exception as error:  # our own bug must delay a mail, never bounce it
                said = answer(bug(error))
            finally:
                if descriptor is not None:
                    os.close(descriptor)
            connection.settimeout(_REQUEST_TIMEOUT)
            connection.sendall(said.encode("utf-8", "replace"))

    def _serve_smtpd(self, connection: socket.socket) -> None:
        """One smtpd, for as long as it asks: what to do with a mail, or a milter."""
        self._asking.add(connection)
        with connection, suppress(OSError):
            connection.setblocking(True)
            if not self._stopping.is_set():
                if connection.recv(1, socket.MSG_PEEK) == milter.FIRST:
                    milter.converse(connection, self._policy.reply_to_header, self._policy.wants_body)
                else:
                    self._policy.converse(connection)
        self._asking.discard(connection)

    def _answer(self, verb: str, fields: Fields, descriptor: int | None) -> str:
        gateway = self.gateway()
        if verb == "deliver" and descriptor is not None:
            verdict = _deliver(gateway, fields, descriptor)
            # Without an answer the client asks again, and waits for the service to come back.
            return "" if isinstance(verdict, Deferred) and verdict.cause == STOPPING else answer(verdict)
        if verb == "delivered":
            uids = fields["uids"].split()
            states = gateway.journal.delivered(key_of("inbox", fields["inbox"], uid, b"") for uid in uids)
            return f"0 delivered\n{' '.join(uid for uid, state in zip(uids, states, strict=True) if state)}\n"
        if verb == "check":
            return answer(prove(gateway.backend(), gateway.config, gateway.spool))
        if verb == "knows":
            return answer(_knows(gateway, fields["recipient"]))
        if verb == "probed":
            note = {
                "at": float(fields["at"]),
                "looked": float(fields["looked"]),
                "seconds": float(fields["seconds"]) if fields["seconds"] else None,
                "queue_id": fields["queue-id"],
                "after": int(fields["after"]),
            }
            with gateway.journal.change() as database:
                gateway.journal.write_note(database, "probe", note)
            return "0 noted\n"
        if verb == "polled":
            with gateway.journal.change() as database:
                gateway.journal.write_note(database, "last poll", time.time())
            return "0 noted\n"
        if verb == "replay":
            return _replay(gateway, fields["id"], fields["to"])
        if verb == "purge":
            number = gateway.quarantine.purge(float(fields["days"]), fields["lost"] == "true")
            return f"0 {number} removed\n"
        return answer(Deferred("4.3.5", "request", f"the service does not know the request {verb!r}"))

    def _in_the_background(self) -> None:
        """What failed inside Zulip or is told late, and what there is to tidy: none goes for long."""
        failures = _patiently(lambda: Failures(self.gateway()).run())
        overdue = _patiently(lambda: late.take_up(self.gateway()))
        alerts = _patiently(lambda: Alerts(self.gateway()).run())
        work_to_do = (
            *(failures, overdue, self._revive, self._look_at_certificate),
            *(lambda: max(alerts(), _ALERTED), self._tidy),
        )
        jobs: list[tuple[Callable[[], float], float]] = [(work, 0.0) for work in work_to_do]
        said: set[str] = set()
        while True:
            now = time.monotonic()
            for number, (work, due) in enumerate(jobs):
                if now < due:
                    continue
                try:
                    pause = work()
                    said.clear()
                except Exception as error:
                    pause, trouble = _TICK, str(error) if isinstance(error, Trouble) else bug(error).reason
                    if trouble not in said:  # once is enough
                        say(trouble)
                    said.add(trouble)
                jobs[number] = (work, now + pause)
            if self._stopping.wait(_TICK):
                return

    def _revive(self) -> float:
        if revival.revive(self.gateway()):
            say("Zulip's mail server answers nothing but 500, and is restarted")
        return _TICK

    def _look_at_certificate(self) -> float:
        """As a sender is shown it: the file may be for root alone."""
        shown = ""

        def look() -> None:
            nonlocal shown
            # While Postfix is stopped, or STARTTLS fails, nobody knows: doctor says why.
            with suppress(OSError, smtplib.SMTPException):
                shown = certificate.shown()

        if postfix.is_ours():
            # Nobody waits for it at the end: before Postfix answers, it asks the service.
            thread = threading.Thread(target=look, daemon=True)
            thread.start()
            while thread.is_alive() and not self._stopping.is_set():
                thread.join(0.1)
        until = (certificate.good_until(shown) or None) if shown else None
        if not self._stopping.is_set():
            with self.gateway().journal.change() as database:
                Journal.write_note(database, "certificate until", until)
        return _HOUR if until else _ALERTED

    def _tidy(self) -> float:
        gateway = self.gateway()
        if gateway.journal.began_anew():
            gateway.quarantine.reindex(since=gateway.journal.note("since"))
        for line in gateway.tidy():
            say(line)
        self._policy.tidy(gateway.journal)
        return _TIDY


def _patiently(work: Callable[[], tuple[list[str], Verdict | None]]) -> Callable[[], float]:
    """Do the work and tell what it did; seconds until the next time: longer each time while Zulip
    does not take the mail."""
    pause = 0.0

    def run() -> float:
        nonlocal pause
        told, waits = work()
        for line in told:
            say(line)
        if isinstance(waits, Refused):
            say(f"what the gateway wanted to post was refused: {waits.reason}")
        pause = min(max(2 * pause, _FIRST_PAUSE), _LONGEST_PAUSE) if waits else 0.0
        return pause

    return run


def _deliver(gateway: Gateway, fields: Fields, descriptor: int) -> Verdict:
    recipient, original = fields["recipient"], fields.get("original-recipient", "")
    if recipient == UNDELIVERABLE:
        with gateway.journal.change() as database:
            add_to_count(database, UNDELIVERABLE, "notice")
        return Delivered("counted", DROPPED)
    # Zulip's own Postfix configuration aliases everything to zulip@localhost; such
    # mail still waits after a takeover.
    if recipient == "zulip@localhost" and original:
        recipient = original
    queue_id, known_by = fields.get("queue-id", ""), tuple[str, ...]()
    if "inbox" in fields:
        source, known_by = "inbox", ("inbox", fields["inbox"], fields["uid"])
    elif queue_id:
        source, known_by = "postfix", ("postfix", queue_id, recipient)
    else:
        source = "operator"
    envelope = Envelope(recipient, fields.get("sender", ""), queue_id, source, known_by)
    # Who delivers by hand does not wait long, and would deliver it once more.
    max_wait = float(fields["max-wait"]) if "max-wait" in fields else None if queue_id else _MAX_WAIT
    with open(os.dup(descriptor), "rb") as file:
        message = Message(file)
        verdict = gateway.deliver(envelope, message, max_wait, keep_refused=source != "inbox")
        if isinstance(verdict, Refused) and source == "postfix" and message.has_longer_header(_MOST_RETURNED):
            what = f"refused, and not sent back: its header has more than {_MOST_RETURNED} bytes"
            return Delivered(f"{what}; {verdict.reason}", DROPPED)
        return verdict


def _knows(gateway: Gateway, recipient: str) -> Verdict:
    """Whether Zulip knows an address; it is not asked for one that it has known today, as that costs."""
    try:
        address = gateway.config.addresses.parse(recipient)
    except ValueError as why:
        return Refused("5.1.1", "no gateway address", str(why))
    if gateway.journal.known_since(address_of(address.token)) > time.time() - _FRESH:
        return Delivered("known")
    return stale(address, gateway.knows(address))


def _replay(gateway: Gateway, name: str, to: str) -> str:
    """Deliver a mail of the quarantine again; it leaves it when Zulip accepts it."""
    copy = gateway.journal.copy(name)
    if copy is None:
        return f"1 no mail {name!r} in quarantine; see: quarantine list\n"
    if copy.waits:
        return f"75 {name}: {copy.reason}; once that is told it leaves the quarantine, or can be delivered again\n"
    envelope = Envelope(to or copy.recipient, copy.sender, copy.queue_id)
    message = gateway.quarantine.message(name, gateway.spool)
    verdict = gateway.deliver(envelope, message, max_wait=_MAX_WAIT, keep_refused=False)
    if isinstance(verdict, Delivered):
        gateway.quarantine.remove(name)
        return f"0 {name}: {verdict.note}\n"
    kind = "refused again" if isinstance(verdict, Refused) else "not now"
    return f"{exit_status(verdict)} {name}: {kind}: {one_line(redact(verdict.reason))}; it stays in quarantine\n"


def _request(connection: socket.socket) -> tuple[str, Fields, int | None]:
    """What is asked, and the message; raises OSError where nothing sensible comes."""
    request, descriptors = b"", list[int]()
    try:
        while not request.endswith(b"\n"):
            piece, rights, _, _ = socket.recv_fds(connection, 65536, 1)
            descriptors += rights
            if not piece or len(request) > _MAX_REQUEST or len(descriptors) > 1:
                raise OSError("not a request")
            request += piece
    except OSError:
        for descriptor in descriptors:
            os.close(descriptor)
        raise
    # An address may have 8-bit characters of any kind; what is shown and stored has none.
    verb, *fields = request[:-1].decode("utf-8", "backslashreplace").split("\0")
    return verb, dict(field.partition("=")[::2] for field in fields), descriptors[0] if descriptors else None


def _opened(loaded: config.Config) -> Gateway:
    """The first gateway, with what earlier versions and former runs have left; raises Trouble."""
    journal = Journal(loaded.state_dir)
    try:
        spool = loaded.state_dir / SPOOL
        spool.mkdir(mode=0o700, exist_ok=True)
        for leftover in spool.iterdir():
            if leftover.stat().st_mtime < time.time() - _LEFT_OVER:
                leftover.unlink()
    except OSError as error:
        raise Trouble("4.3.0", "spool", f"cannot use {loaded.state_dir}: {error.strerror}") from error
    gateway = Gateway(loaded, journal)
    migration.run(loaded.state_dir, gateway)
    gateway.outcomes.after_a_start()
    gateway.pace.after_a_start()
    gateway.quarantine.reindex()
    return gateway


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_mtime_ns, status.st_ino, status.st_size, status.st_mode, status.st_uid


def listening_sockets() -> tuple[socket.socket, socket.socket | None]:
    """The sockets that systemd has passed (sd_listen_fds_with_names(3)): where mail is submitted, and where
    smtpd asks, if it does. Raises Trouble."""
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or SUBMIT not in names:
        what = "systemd starts the service with its socket; run: systemctl start zulip-email-gateway.socket"
        raise Trouble("4.3.0", "socket", what)
    found = {name: socket.socket(fileno=_FIRST_DESCRIPTOR + number) for number, name in enumerate(names)}
    return found[SUBMIT], found.get(POLICY)


def say(text: str) -> None:
    """A line for systemd's journal, without whole addresses; a line end in it would begin another one."""
    os.write(sys.stdout.fileno(), (one_line(redact(text), _LONGEST_LINE) + "\n").encode("utf-8", "replace"))
