"""Takes mail out of an IMAP inbox, one after the other.

A process of its own, because it reads what strangers send; the service hands the mail
over. A mail leaves the inbox only when Zulip has accepted it, or for the folder of what
cannot be posted. What was accepted but not yet removed when the program ended stands in
the service's journal, and is only removed.
"""

from __future__ import annotations

import fcntl
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from . import addresses
from .addresses import redact, token_of
from .client import Client
from .config import Config, Imap
from .imap_session import FAILED_FOLDER, Declined, ImapSession
from .message import stored
from .oauth import Tokens
from .recipient_field import find_recipient
from .submission import SPOOL
from .verdict import RATE_LIMITED, Deferred, Delivered, Trouble, Verdict, bug

# Wait this long (seconds) for new mail before looking again by oneself. Short at
# first: a server may have told of a mail in the answer to another command.
WAITS = (2.0, 8.0, 32.0, 128.0, 540.0)
# Wait this long before trying again what Zulip could not take, and before connecting
# again; the last one over and over.
RETRIES = (2.0, 5.0, 10.0, 20.0, 40.0, 60.0)
# Wait this long for room within Zulip's limits before looking for replies behind, and
# as long for new mail before asking for room again.
MAX_WAIT, ROOM_RETRY = 1.0, 4.0
# So many mails in a row that Zulip could not take: it is not the mails.
ENOUGH = 3


# Causes for which not this one mail waits, but all of its channel (for room), or of all channels.
_NO_ROOM = (RATE_LIMITED, "worker")


class Round(NamedTuple):
    """What came of one round: the mails it has seen, by UID, how many left the inbox, how
    many stay, and whether that is for want of room within Zulip's limits."""

    uids: set[int]
    taken: int
    left: int
    no_room: bool


class Stopped(BaseException):
    """The service is to end."""


def look_into(imap: Imap, state_dir: Path, timeout: float) -> str:
    """Log in and open the folder; what was found there. Raises Trouble."""
    mailbox = ImapSession(imap, _tokens(imap, state_dir, timeout), timeout)
    try:
        waiting = len(mailbox.uids())
    finally:
        mailbox.close()
    return f"logged in to {imap.server} as {imap.login}: {waiting} mails in {imap.folder}"


def _tokens(imap: Imap, state_dir: Path, timeout: float) -> Tokens | None:
    if not imap.token_endpoint:
        return None
    return Tokens(imap.token_endpoint, imap.secrets(), imap.scope, state_dir / "refresh-token", timeout)


class Inbox:
    """Reads the inbox that is configured. spool: a folder for the mail under way."""

    def __init__(self, config: Config, service: Client, spool: Path = Path(SPOOL)) -> None:
        assert config.imap is not None
        self._config = config
        self._service = service
        self._spool = spool
        self._imap = config.imap
        self._tokens = _tokens(self._imap, config.state_dir, config.timeout)
        self._identity = ""
        # The recipients of what still waits, by UID.
        self._recipients: dict[int, str | None] = {}
        # What they wait for, the one tried last at the end; so the journal has it once.
        self._waiting_for: dict[int, str] = {}
        # What the server would not hand out or move.
        self._stuck: set[int] = set()
        self._failures = 0
        self._stopping = self._waiting = False

    def run(self) -> None:
        """Take what comes, for ever."""
        with open(self._config.state_dir / "inbox.lock", "w", encoding="ascii") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise Trouble("4.3.2", "lock", "another process reads the inbox already") from None
            signal.signal(signal.SIGTERM, self._on_sigterm)
            try:
                while True:
                    self._one_session()
            except Stopped:
                return

    def _one_session(self) -> None:
        """Log in, serve until something breaks, and wait."""
        try:
            mailbox = ImapSession(self._imap, self._tokens, self._config.timeout)
            try:
                _say(f"reading {self._imap.folder} of {self._imap.login} at {self._imap.server}")
                self._serve(mailbox)
            finally:
                mailbox.close()
        except Stopped:
            raise
        except Exception as error:
            pause = RETRIES[min(self._failures, len(RETRIES) - 1)]
            self._failures += 1
            why = error if isinstance(error, Trouble) else bug(error).reason
            _say(f"{why}; next try in {pause:g} s")
            with self._may_be_stopped():
                time.sleep(pause)

    def _on_sigterm(self, *_: object) -> None:
        """Stop between two mails."""
        self._stopping = True
        if self._waiting:
            raise Stopped

    @contextmanager
    def _may_be_stopped(self) -> Iterator[None]:
        self._waiting = True
        try:
            if self._stopping:
                raise Stopped
            yield
        finally:
            self._waiting = False

    def _serve(self, mailbox: ImapSession) -> None:
        """Rounds through the inbox; ends with Trouble when the session breaks."""
        if mailbox.identity != self._identity:
            self._identity = mailbox.identity
            self._recipients.clear()
            self._waiting_for.clear()
        self._stuck.clear()
        # The session before may have broken in the middle of it.
        for uid in self._service.delivered(mailbox.identity, mailbox.half_removed()):
            with self._alone(uid):
                mailbox.remove(uid)
        quiet = deferred = 0
        while True:
            seen = self.take_all(mailbox)
            self._failures = 0
            if seen.no_room:
                pause = ROOM_RETRY
            elif seen.left:
                pause = RETRIES[min(deferred, len(RETRIES) - 1)]
                deferred = 0 if seen.taken else deferred + 1
            else:
                quiet, deferred = (0 if seen.taken else quiet + 1), 0
                pause = WAITS[min(quiet, len(WAITS) - 1)]
            # The server has told of these already, in the answer to another command.
            if not set(mailbox.uids()) - seen.uids:
                with self._may_be_stopped():
                    mailbox.wait(pause)

    def take_all(self, mailbox: ImapSession) -> Round:
        """One round through what is in the inbox, and the replies that come meanwhile."""
        uids = mailbox.uids()
        done = self._service.delivered(mailbox.identity, uids)
        # Those that Zulip or the server had trouble with come last, in the order in which
        # they were tried: it may be they.
        trouble = [uid for uid, cause in self._waiting_for.items() if cause not in _NO_ROOM]
        queue = [uid for uid in uids if uid not in trouble] + [uid for uid in trouble if uid in uids]
        seen, taken, in_a_row = set(uids), 0, 0
        waiting = set[str]()  # tokens of channels; "" for all
        while queue and in_a_row < ENOUGH:
            uid = queue.pop(0)
            if self._stopping:
                raise Stopped
            if uid in self._stuck or (uid not in done and self._has_to_wait(mailbox, uid, waiting)):
                continue
            verdict = self._remove_or_take(mailbox, uid, uid in done)
            if uid in self._stuck:
                continue
            if not isinstance(verdict, Deferred):
                taken, in_a_row = taken + 1, 0
                replies = [new for new in mailbox.uids() if new not in seen and self._is_reply(mailbox, new)]
                seen.update(replies)
                queue[:0] = replies
            elif verdict.cause in _NO_ROOM:
                waiting.add(self._token(uid) if verdict.cause == RATE_LIMITED else "")
                in_a_row = 0
            else:
                in_a_row += 1
        self._recipients = {uid: found for uid, found in self._recipients.items() if uid in seen}
        self._waiting_for = {uid: cause for uid, cause in self._waiting_for.items() if uid in seen}
        return Round(seen, taken, len(seen) - taken, bool(waiting))

    def _remove_or_take(self, mailbox: ImapSession, uid: int, is_done: bool) -> Verdict | None:
        with self._alone(uid):
            if is_done:
                mailbox.remove(uid)
                return None
            try:
                return self._take(mailbox, uid)
            except Trouble:
                raise
            except Exception as error:  # a bug of ours
                return self._waits(uid, bug(error))
        return None

    @contextmanager
    def _alone(self, uid: int) -> Iterator[None]:
        """What goes wrong with this mail must not stop the others."""
        try:
            yield
        except Declined as trouble:
            self._stuck.add(uid)
            _say(f"UID {uid} is left alone until the next session: {trouble}")
        except Trouble as trouble:  # the session broke, and it may be this mail that breaks it
            self._tried(uid, trouble.verdict.cause)
            raise

    def _take(self, mailbox: ImapSession, uid: int) -> Verdict | None:
        """Deliver one mail, and move it where it belongs; None if it has gone by itself."""
        recipient = self._recipient(mailbox, uid)
        if recipient is None:
            self._set_aside(mailbox, uid, "no address of this Zulip in its header")
            return None
        with stored(self._spool) as file:
            size = mailbox.message(uid, file)
            if size is None:
                return None
            verdict = self._service.deliver(file, MAX_WAIT, recipient=recipient, inbox=mailbox.identity, uid=str(uid))
        if isinstance(verdict, Delivered):
            mailbox.remove(uid)
            _say(f"UID {uid}, {size} bytes for {recipient}: {verdict.note}")
        elif isinstance(verdict, Deferred):
            self._waits(uid, verdict)
        else:
            self._set_aside(mailbox, uid, verdict.reason)
        return verdict

    def _waits(self, uid: int, verdict: Deferred) -> Deferred:
        """Note that a mail waits, and say why if that is new."""
        if self._tried(uid, verdict.cause) != verdict.cause:
            _say(f"UID {uid} waits: {verdict.reason}")
        return verdict

    def _tried(self, uid: int, cause: str) -> str | None:
        """Note what a mail waits for, and that it was tried last; what it waited for before."""
        before = self._waiting_for.pop(uid, None)
        self._waiting_for[uid] = cause
        return before

    def _recipient(self, mailbox: ImapSession, uid: int) -> str | None:
        if uid not in self._recipients:
            header = mailbox.header(uid) or b""
            self._recipients[uid] = find_recipient(header, self._config.pattern)
        return self._recipients[uid]

    def _has_to_wait(self, mailbox: ImapSession, uid: int, waiting: set[str]) -> bool:
        """True for mail to a channel for which a mail waits already."""
        if not waiting or self._is_reply(mailbox, uid):
            return False
        return "" in waiting or self._token(uid) in waiting

    def _token(self, uid: int) -> str:
        return token_of(self._recipients.get(uid) or "-", self._config.pattern)

    def _is_reply(self, mailbox: ImapSession, uid: int) -> bool:
        recipient = None
        with self._alone(uid):
            recipient = self._recipient(mailbox, uid)
        try:
            return recipient is not None and addresses.parse(recipient, self._config.pattern).is_reply
        except ValueError:
            return False

    def _set_aside(self, mailbox: ImapSession, uid: int, why: str) -> None:
        mailbox.set_aside(uid)
        _say(f"UID {uid} is now in {FAILED_FOLDER}: {why}")


def _say(text: str) -> None:
    """A line for the journal, without whole addresses."""
    os.write(1, (redact(text) + "\n").encode("utf-8", "replace"))
