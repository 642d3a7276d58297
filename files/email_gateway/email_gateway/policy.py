"""What smtpd asks before it accepts a mail (Postfix's SMTPD_POLICY_README, and milter.py).

At RCPT: whether Zulip knows the address, and whether too much waits for the channel already. With
the header: whether its senders may write there. At the end of DATA: whether the mail still fits,
which then counts as waiting. Whatever goes wrong here, the mail is accepted, and its delivery tells
what becomes of it.
"""

from __future__ import annotations

import re
import socket
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from threading import Lock
from typing import NamedTuple

from . import admission, sender_checks
from .address_book import SendsOnly, stale
from .addresses import NotAGatewayAddress, OtherPattern
from .gateway import Gateway
from .journal import REJECTED, Journal, add_to_count, address_of
from .message import Message
from .questions import TOO_MANY, Questions, network_of
from .verdict import UNKNOWN_ADDRESS, Deferred, Refused, Trouble, bug, one_line

DUNNO = "DUNNO"
# A request is some 30 lines of text (bytes).
_MAX_REQUEST = 2**16
# Mail to postmaster: so large at most (bytes), so many of one client in so many seconds, and of
# all. It lies in root's mailbox, which is to have room; nobody alone may keep others from it.
_MOST_BYTES = 100 * 2**10
_OF_ONE, _OF_ALL = ((5, 3600.0), (20, 86400.0)), (200, 86400.0)

# No honest mail has so many lines that begin with two dashes, and parts.
_MOST_DASHES = 20_000
_HAS_PARTS = re.compile(rb"(?i)multipart|message/")

# What a client is told to come back for.
_LATER = (TOO_MANY, UNKNOWN_ADDRESS)

Request = dict[str, str]


class Rejection(NamedTuple):
    """SMTP reply code, enhanced status code (RFC 3463), what to count it by, and a text for the sender."""

    code: int
    status: str
    cause: str
    text: str

    def __str__(self) -> str:
        return f"{self.code} {self.status} {one_line(self.text, 400)}"


@dataclass
class Coming:
    """A mail that smtpd is taking in: its attribute "instance", and for whom it was let through."""

    instance: str = ""
    channels: list[bytes] = field(default_factory=list)
    to_postmaster: bool = False
    client: str = ""


class Policy:
    """Answers smtpd, for several threads.

    gateway: as it is configured now; raises Trouble. begin: starts a thread with this work, if it
    can. say: tells the operator.
    """

    def __init__(
        self,
        gateway: Callable[[], Gateway],
        begin: Callable[[Callable[[], None]], bool],
        say: Callable[[str], None],
    ) -> None:
        self._gateway = gateway
        self._say = say
        self._said = ""
        self._questions = Questions(begin)
        self._lock, self._taking_in = Lock(), Lock()
        self._journal: Journal | None = None
        self._rejected: Counter[str] = Counter()
        # When (monotonic) mail to postmaster came, and from whom.
        self._to_postmaster: deque[tuple[float, str]] = deque(maxlen=_OF_ALL[0])

    def converse(self, connection: socket.socket) -> None:
        """Answer one smtpd until it leaves; raises OSError."""
        mail, text = Coming(), b""
        while True:
            end = text.find(b"\n\n")
            if end < 0:
                piece = connection.recv(_MAX_REQUEST)
                if not piece or len(text) > _MAX_REQUEST:
                    return
                text += piece
                continue
            request, text = _parsed(text[:end]), text[end + 2 :]
            if request.get("instance", "") != mail.instance:
                mail = Coming(request.get("instance", ""))
            connection.sendall(f"action={self._action(request, mail)}\n\n".encode("ascii", "replace"))

    @property
    def wants_body(self) -> bool:
        """True if `look` has to know how many lines of a mail begin with two dashes."""
        with suppress(Trouble):
            return self._gateway().config.sender_checks != sender_checks.OFF
        return False

    def reply_to_header(self, sender: str, recipients: list[str], header: Message, dashes: int = 0) -> str:
        """The SMTP reply to a mail whose header this is, if it may not go to one of its recipients; else nothing.
        It goes to none of them then: the alternative is a bounce, to a sender who may be forged."""
        return self._reply(partial(self._refusal, sender, recipients, header, dashes))

    def _refusal(self, sender: str, recipients: list[str], header: Message, dashes: int) -> Rejection | None:
        config = self._gateway().config
        # rspamd takes 40 microseconds and 8 KiB for each part: this is asked before it as well.
        if dashes > _MOST_DASHES and config.sender_checks != sender_checks.OFF and _HAS_PARTS.search(header.header()):
            text = f"this mail has more than {_MOST_DASHES} lines that may begin a part; its sender cannot be checked"
            return Rejection(550, "5.6.0", "sender check", text)
        for recipient in recipients:
            try:
                verdict = admission.verdict(config, recipient, sender, header)
            except ValueError:  # postmaster, or what its delivery has to tell
                continue
            if isinstance(verdict, Refused | Deferred):
                return _rejection(verdict)
        return None

    def _action(self, request: Request, mail: Coming) -> str:
        return self._reply(partial(self._decision, request, mail)) or DUNNO

    def _reply(self, decide: Callable[[], Rejection | None]) -> str:
        try:
            rejection = decide()
        except Exception as error:  # a bug of ours, too, must not stop any mail
            trouble = str(error) if isinstance(error, Trouble) else bug(error).reason
            if trouble != self._said:  # once is enough
                self._say(f"mail is accepted without looking: {trouble}")
            self._said = trouble
            return ""
        self._said = ""
        if rejection is None:
            return ""
        with self._lock:
            self._rejected[rejection.cause] += 1
        return str(rejection)

    def _decision(self, request: Request, mail: Coming) -> Rejection | None:
        gateway = self._gateway()
        if request.get("protocol_state") == "END-OF-MESSAGE":
            return self._at_the_end(request, mail, gateway)
        if request.get("protocol_state") != "RCPT":
            return None
        recipient = request.get("recipient", "")
        if recipient.partition("@")[0].lower() == "postmaster":
            mail.to_postmaster, mail.client = True, network_of(request.get("client_address", ""))
            return self._postmaster(mail.client)
        try:
            address = gateway.config.addresses.parse(recipient)
        except SendsOnly:  # bounces, and senders' servers that ask whether it is there
            return None
        except NotAGatewayAddress as why:
            return Rejection(550, "5.1.1", "no gateway address", str(why))
        except OtherPattern:  # until site.yml has run again; the delivery says so
            return None
        if refused := gateway.config.addresses.not_allowed(address, [request.get("sender", "")]):
            return _rejection(refused)
        key, reading = address_of(address.token), self._reading(gateway)
        if not address.is_reply and gateway.backlog.is_full(key, gateway.config.most_queued, reading):
            return _full(gateway.config.most_queued)
        if gateway.config.asks:
            answer = self._questions.verdict(address, request.get("client_address", ""), gateway, reading)
            verdict = stale(address, answer)
            if isinstance(verdict, Refused) or (isinstance(verdict, Deferred) and verdict.cause in _LATER):
                return _rejection(verdict)
        if not address.is_reply:
            mail.channels.append(key)
        return None

    def _at_the_end(self, request: Request, mail: Coming, gateway: Gateway) -> Rejection | None:
        size = request.get("size", "")
        if mail.to_postmaster and size.isdecimal() and int(size) > _MOST_BYTES:
            return Rejection(552, "5.3.4", "large mail to postmaster", f"postmaster takes at most {_MOST_BYTES} bytes")
        most = gateway.config.most_queued
        with self._taking_in:  # one after the other, or some would be too many
            if mail.to_postmaster and (rejection := self._postmaster(mail.client)):
                return rejection
            if any(gateway.backlog.is_full(key, most, gateway.journal) for key in mail.channels):
                return _full(most)
            if mail.channels:
                gateway.journal.queue(mail.channels, request.get("queue_id", ""))
            if mail.to_postmaster:
                self._to_postmaster.append((time.monotonic(), mail.client))
        return None

    def _postmaster(self, client: str) -> Rejection | None:
        now = time.monotonic()
        came = list(self._to_postmaster)
        of_one = [at for at, whose in came if whose == client]
        is_much = any(sum(at > now - seconds for at in of_one) >= number for number, seconds in _OF_ONE)
        if is_much or sum(at > now - _OF_ALL[1] for at, _ in came) >= _OF_ALL[0]:
            text = "postmaster has got much mail lately; please try again later"
            return Rejection(450, "4.7.28", "much mail to postmaster", text)
        return None

    def _reading(self, gateway: Gateway) -> Journal:
        """The journal on a connection of its own, so that nobody here waits for the disk."""
        with self._lock:
            if self._journal is None:
                self._journal = Journal(gateway.config.state_dir, create=False)
            return self._journal

    def close(self) -> None:
        """Give up the connection to the journal."""
        with self._lock:
            if self._journal is not None:
                self._journal.close()

    def tidy(self, journal: Journal) -> None:
        """Count what was rejected since the last time; raises Trouble."""
        with self._lock:
            rejected = self._rejected.copy()
        if rejected:
            with journal.change() as database:
                for cause, number in rejected.items():
                    add_to_count(database, REJECTED, cause, number)
            with self._lock:
                self._rejected -= rejected


def _rejection(verdict: Refused | Deferred) -> Rejection:
    code = 550 if isinstance(verdict, Refused) else 450
    return Rejection(code, verdict.status, verdict.cause, verdict.reason)


def _full(most: int) -> Rejection:
    text = f"{most} mails wait for this channel already, and no more may; please try again later"
    return Rejection(450, "4.7.28", "too much waiting", text)


def _parsed(text: bytes) -> Request:
    """The lines name=value; of the same name the last."""
    lines = text.decode("utf-8", "replace").split("\n")
    return dict(line.partition("=")[::2] for line in lines)


def end(connection: socket.socket) -> None:
    """Let nobody ask any more; what was asked is answered."""
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RD)
