"""Takes mail out of an IMAP inbox, one after the other.

A process of its own, because it reads what strangers send; the service hands the mail
over. A mail leaves the inbox only when Zulip has accepted it, or for the folder of what
cannot be posted; one that is not for Zulip stays. What was accepted but not yet removed when
the program ended stands in the service's journal, and is only removed.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from . import watchdog
from .address_book import AddressBook
from .addresses import redact
from .client import Client
from .config import Config, Imap
from .imap_session import FAILED_FOLDER, Declined, ImapSession
from .inbox_notes import Notes
from .message import stored
from .oauth import Tokens
from .recipient_field import find_recipients
from .submission import SPOOL
from .verdict import RATE_LIMITED, Deferred, Refused, Trouble, bug

# Wait this long (seconds) for new mail before looking again by oneself. Short at
# first: a server may have told of a mail in the answer to another command.
WAITS = (2.0, 8.0, 32.0, 128.0, 540.0)
# Wait this long before trying again what Zulip could not take, and before connecting
# again; the last one over and over.
RETRIES = (2.0, 5.0, 10.0, 20.0, 40.0, 60.0)
# Wait this long for Zulip's rate limit before looking for replies behind, and
# as long for new mail before asking again.
MAX_WAIT, LIMIT_RETRY = 1.0, 4.0
# So many mails in a row that Zulip could not take: it is not the mails.
ENOUGH = 3
# A mail that Zulip cannot take is tried again after half the time since the first try, within
# these limits, and not any more after five days (seconds); as in Postfix's queue.
DAY = 86400.0
SOONEST, LATEST, GIVEN_UP, FEWEST_TRIES = 2.0, 1000.0, 5 * DAY, 5
# A mail that the server does not show or move is left alone for so long (seconds).
LEFT_ALONE = 900.0
# What a mail waits for that has broken the session.
BROKEN = "session"
# So many headers are fetched at once; so many addresses a mail may be for.
BATCH, MOST_RECIPIENTS = 50, 20
# An inbox with more mails than this is looked at, its latest ones: where fewer than this part are for Zulip, it
# is somebody's own.
MANY, SAMPLE, FEW = 50, 200, 0.1
# Reading some headers takes no longer (seconds).
READ_WITHIN = 30.0


# Causes for which not this one mail waits, but all of its channel (for the rate limit), or of all channels.
_OF_CHANNEL = (RATE_LIMITED, "worker")


class Round(NamedTuple):
    """What came of one round: how many mails for Zulip have left the inbox, how many stay, and
    whether that is because of Zulip's rate limit."""

    taken: int
    left: int
    rate_limited: bool


class Found(NamedTuple):
    """A mail for Zulip in the inbox: its size (bytes), and to which of Zulip's addresses it is."""

    size: int
    recipients: tuple[str, ...]


class Waits(NamedTuple):
    """What a mail waits for, and the token of the address for which it does."""

    verdict: Deferred
    token: str


class Stopped(BaseException):
    """The service is to end."""


def look_into(imap: Imap, book: AddressBook | None, state_dir: Path, timeout: float) -> str:
    """Log in and open the folder; what was found there. Raises Trouble.

    book: given, an inbox that was not read before is refused if it looks like somebody's own.
    """
    mailbox = ImapSession(imap, tokens_of(imap, state_dir, timeout), timeout)
    try:
        uids = mailbox.uids()
        if book is not None and len(uids) > MANY and not Notes(state_dir, _inbox(mailbox, book)).is_known:
            latest, wanted = uids[-SAMPLE:], 0
            for first in range(0, len(latest), BATCH):
                seen = mailbox.headers(latest[first : first + BATCH]).values()
                wanted += sum(bool(find_recipients(header, book)) for _, header in seen)
            if wanted < len(latest) * FEW:
                reason = (
                    f"{imap.folder} of {imap.login} holds {len(uids)} mails, and of the latest {len(latest)} only "
                    f"{wanted} are for Zulip: is it somebody's own? Give the gateway an inbox of its own, or another "
                    "email_gateway_imap_folder. Or set email_gateway_polling_accept_existing: true; what is not for "
                    "Zulip then stays where it is"
                )
                raise Trouble("4.3.5", "inbox", reason)
    finally:
        mailbox.close()
    return f"logged in to {imap.server} as {imap.login}: {len(uids)} mails in {imap.folder}"


def _inbox(mailbox: ImapSession, book: AddressBook) -> str:
    """What Notes tell inboxes apart by: with other addresses there is more in it for Zulip, or less."""
    others = " ".join([*(former.address("%s") for former in book.former), *sorted(book.aliases)])
    return f"{mailbox.identity} {book.pattern.address('%s')} {others}".rstrip()


def tokens_of(imap: Imap, state_dir: Path, timeout: float) -> Tokens | None:
    """What logs in without a password; None where there is one."""
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
        self._tokens = tokens_of(self._imap, config.state_dir, config.timeout)
        self._identity = ""
        self._notes: Notes
        # Of what was looked at, what is for Zulip, by UID; and which of it Zulip has already.
        self._mails: dict[int, Found] = {}
        self._done: set[int] = set()
        # What is not for Zulip, as far as _notes do not tell.
        self._others: set[int] = set()
        # What mails wait for, the one tried last at the end; so the journal has it once.
        self._waiting_for: dict[int, str] = {}
        # When to try again (Unix seconds), how often that was; and since when Zulip takes nothing at all.
        self._due: dict[int, float] = {}
        self._tries: dict[int, int] = {}
        self._down_since: float | None = None
        # What the server would not show or move, and since when (Unix seconds).
        self._stuck: dict[int, float] = {}
        # What is better looked at alone: one of them has broken a session.
        self._singly: set[int] = set()
        # What is in the folder, but for what is noted not to be for Zulip; and what this round began with.
        self._present: set[int] = set()
        self._seen: set[int] = set()
        # When the service was told to remember what it has delivered (Unix seconds).
        self._reminded = 0.0
        # And that the inbox was looked through.
        self._told_polled = 0.0
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
            self._step()
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
            self._step(pause)
            with self._may_be_stopped():
                time.sleep(pause)

    def _step(self, seconds: float = 0.0) -> None:
        """What is done until the next step takes some answers of the server and the service, and that time."""
        watchdog.expect(60.0 + seconds + 10 * self._config.timeout + self._config.hand_over)

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
        # The session before may have broken in the middle of it.
        with suppress(Declined):
            for uid in self._service.delivered(mailbox.identity, mailbox.half_removed()):
                with self._alone(uid):
                    mailbox.remove(uid)
        self._stuck.clear()
        idle = deferred = 0
        while True:
            seen = self.take_all(mailbox)
            self._failures = 0
            self._tell_polled()
            if seen.rate_limited:
                pause = LIMIT_RETRY
            elif seen.left:
                pause = RETRIES[min(deferred, len(RETRIES) - 1)]
                deferred = 0 if seen.taken else deferred + 1
            else:
                idle, deferred = (0 if seen.taken else idle + 1), 0
                pause = WAITS[min(idle, len(WAITS) - 1)]
            # The server has told of these already, in the answer to another command.
            if not set(mailbox.uids(self._notes.passed)) - self._seen - self._others:
                self._step(pause)
                with self._may_be_stopped():
                    mailbox.wait(pause)

    def _tell_polled(self) -> None:
        """For doctor and the metrics; once a minute will do."""
        now = time.time()
        if now > self._told_polled + 60.0:
            self._told_polled = now
            with suppress(Trouble):  # what cannot be told is told later
                self._service.ask("polled")

    def take_all(self, mailbox: ImapSession) -> Round:
        """One round through what is in the inbox, and the replies that come meanwhile."""
        self._know(mailbox)
        began = time.time()
        queue = self._queue(mailbox)
        self._seen = set(self._present)
        taken = in_a_row = 0
        waiting = set[str]()  # tokens of channels; "" for all
        while queue and in_a_row < ENOUGH:
            if self._stopping:
                raise Stopped
            self._step()
            uid = queue.pop(0)
            is_due = self._due.get(uid, 0.0) <= time.time()
            if not (is_due or uid in self._done) or not self._is_for_zulip(mailbox, uid, queue):
                continue
            is_done = uid in self._done
            if not is_done and self._has_to_wait(uid, waiting):
                continue
            waits = self._remove_or_take(mailbox, uid, is_done)
            if uid in self._stuck:
                continue
            if waits is None:
                taken, in_a_row = taken + 1, 0
                self._is_up()
                queue[:0] = self._new_replies(mailbox)
            elif waits.verdict.cause in _OF_CHANNEL:
                waiting.add(waits.token if waits.verdict.cause == RATE_LIMITED else "")
                in_a_row = 0
            else:
                in_a_row += 1
        if (in_a_row >= ENOUGH or (in_a_row and not taken)) and self._down_since is None:
            self._down_since = began
        self._pass_over()
        return Round(taken, len(self._present - self._others), bool(waiting))

    def _know(self, mailbox: ImapSession) -> None:
        """Begin anew with an inbox that is not the one of the session before."""
        if mailbox.identity != self._identity:
            self._identity = mailbox.identity
            self._notes = Notes(self._config.state_dir, _inbox(mailbox, self._config.addresses))
            self._mails, self._waiting_for, self._due, self._tries = {}, {}, {}, {}
            self._done, self._others, self._singly = set(), set(), set()

    def _queue(self, mailbox: ImapSession) -> list[int]:
        """What may be for Zulip, in the order in which to try; what has left the inbox is forgotten."""
        uids = mailbox.uids(self._notes.passed)
        self._present = set(uids)
        for gone in {*self._mails, *self._waiting_for, *self._due} - self._present:
            self._forget(gone)
        self._others &= self._present
        self._singly &= self._present
        self._notes.keep_only(self._present)
        now = time.time()
        self._stuck = {uid: since for uid, since in self._stuck.items() if now < since + LEFT_ALONE}
        if self._done and now > self._reminded + DAY:
            self._service.delivered(mailbox.identity, sorted(self._done))
            self._reminded = now
        # Those that Zulip or the server had trouble with come last, in the order in which
        # they were tried: it may be they.
        trouble = [uid for uid, cause in self._waiting_for.items() if cause not in _OF_CHANNEL]
        last = set(trouble) | self._others
        return [uid for uid in uids if uid not in last] + trouble

    def _is_for_zulip(self, mailbox: ImapSession, uid: int, queue: list[int]) -> bool:
        """Whether a mail is for Zulip, as far as it can be read; looks at those that are next in the queue as well."""
        alone = self._notes.suspects | self._singly
        if not self._is_known(uid) and uid not in alone:
            unknown = (other for other in queue if other != uid and not self._is_known(other) and other not in alone)
            batch = [uid, *itertools.islice(unknown, BATCH - 1)]
            try:
                self._look_at(mailbox, batch)
            except Trouble as trouble:  # it may be one of them
                self._singly |= set(batch)
                if not isinstance(trouble, Declined):
                    raise
        if not self._is_known(uid):
            with self._alone(uid):
                self._look_at(mailbox, [uid])
        return uid in self._mails and uid not in self._stuck

    def _is_known(self, uid: int) -> bool:
        return uid in self._mails or uid in self._others or uid in self._stuck

    def _look_at(self, mailbox: ImapSession, uids: list[int]) -> None:
        """Find out to whom mails are, and which of them Zulip has already."""
        for uid in uids:
            with self._alone(uid):
                if uid in self._notes.too_bad:
                    self._set_aside(mailbox, uid, "the gateway has ended twice while it read its header")
                elif self._breaks_for_good(uid):
                    self._set_aside(mailbox, uid, "the session with the server has broken each time that it was read")
        uids = [uid for uid in uids if uid in self._present and uid not in self._stuck]
        seen = mailbox.headers(uids) if uids else {}
        self._not_shown(mailbox, set(uids) - seen.keys())
        watchdog.expect(READ_WITHIN)
        with self._notes.reading(list(seen)):
            for uid, (size, header) in seen.items():
                recipients = tuple(find_recipients(header, self._config.addresses))
                if recipients:
                    self._mails[uid] = Found(size, recipients)
                else:
                    self._others.add(uid)
        self._step()
        self._done |= self._service.delivered(mailbox.identity, sorted(seen.keys() & self._mails.keys()))

    def _not_shown(self, mailbox: ImapSession, uids: set[int]) -> None:
        """The server has not shown these: they are gone, or it cannot."""
        if uids:
            left = uids & set(mailbox.uids(min(uids) - 1))
            for uid in uids - left:
                self._forget(uid)
            for uid in left:
                self._leave_alone(uid, "the server does not show it")

    def _leave_alone(self, uid: int, why: object) -> None:
        self._stuck[uid] = time.time()
        _say(f"UID {uid} is left alone for {LEFT_ALONE / 60:.0f} minutes: {why}")

    def _breaks_for_good(self, uid: int) -> bool:
        """Whether the session has broken over a mail for so long that it is not read any more."""
        return self._waiting_for.get(uid) == BROKEN and self._is_given_up(uid)

    def _pass_over(self) -> None:
        """Note up to where there is nothing for Zulip."""
        left = self._present - self._others
        others = [uid for uid in self._others if not left or uid < min(left)]
        self._notes.pass_over(max((self._notes.passed, *others)))
        self._others.difference_update(others)
        self._present.difference_update(others)
        if others:
            _say(f"{len(others)} mails are not for Zulip, and stay")

    def _new_replies(self, mailbox: ImapSession) -> list[int]:
        """Replies to notifications that have come since the round began; they do not wait."""
        new = mailbox.uids(max((*self._present, *self._seen, self._notes.passed)))
        self._present |= set(new)
        replies = []
        for place, uid in enumerate(new):
            if self._stopping:
                raise Stopped
            if self._is_for_zulip(mailbox, uid, new[place + 1 :]) and self._is_reply(uid):
                replies.append(uid)
        self._seen |= set(replies)
        return replies

    def _remove_or_take(self, mailbox: ImapSession, uid: int, is_done: bool) -> Waits | None:
        with self._alone(uid):
            if is_done:
                self._remove(mailbox, uid)
                return None
            try:
                waits = self._take(mailbox, uid)
            except Trouble:
                raise
            except Exception as error:  # a bug of ours
                waits = Waits(bug(error), "")
            if waits is not None:
                self._not_taken(mailbox, uid, waits.verdict)
            return waits
        return None

    @contextmanager
    def _alone(self, uid: int) -> Iterator[None]:
        """What goes wrong with this mail must not stop the others."""
        try:
            yield
        except Declined as trouble:
            self._leave_alone(uid, trouble)
        except Trouble:  # the session broke, and it may be this mail that breaks it
            self._tried(uid, BROKEN)
            self._try_later(uid)
            raise

    def _take(self, mailbox: ImapSession, uid: int) -> Waits | None:
        """Deliver one mail to all that it is for, and move it where it belongs."""
        recipients, largest = self._mails[uid].recipients, self._imap.largest
        if why := self._unfit(uid):
            self._set_aside(mailbox, uid, why)
            return None
        refused: list[str] = []
        posted: list[str] = []
        waits: Waits | None = None
        with stored(self._spool) as file:
            size = mailbox.message(uid, file, largest, self._step)
            if size is None:
                self._not_shown(mailbox, {uid})
                return None
            if size > largest:
                self._set_aside(mailbox, uid, f"it has more than {largest} bytes, the most that Zulip takes")
                return None
            for recipient in recipients:
                self._step()
                name = str(uid) if len(recipients) == 1 else f"{uid} {recipient}"
                verdict = self._service.deliver(file, MAX_WAIT, recipient=recipient, inbox=mailbox.identity, uid=name)
                if isinstance(verdict, Deferred):
                    waits = waits or Waits(verdict, self._config.addresses.token_of(recipient))
                elif isinstance(verdict, Refused):
                    refused.append(verdict.reason if len(recipients) == 1 else f"{recipient}: {verdict.reason}")
                else:
                    posted.append(f"UID {uid}, {size} bytes for {recipient}: {verdict.note}")
        if waits is not None:
            return waits
        for line in posted:
            _say(line)
        if refused:
            self._set_aside(mailbox, uid, "; ".join(refused))
        else:
            self._done.add(uid)
            self._remove(mailbox, uid)
        return None

    def _unfit(self, uid: int) -> str:
        """Why a mail is not even read; empty if it is."""
        size, recipients = self._mails[uid]
        if self._breaks_for_good(uid):
            return "the session with the server has broken each time that it was read"
        if len(recipients) > MOST_RECIPIENTS:
            return f"it is for {len(recipients)} addresses, and at most {MOST_RECIPIENTS} are served"
        if size > self._imap.largest:
            return f"it has {size} bytes, and Zulip takes at most {self._imap.largest}"
        return ""

    def _not_taken(self, mailbox: ImapSession, uid: int, verdict: Deferred) -> None:
        """Note that a mail waits, and say why if that is new; give it up in the end."""
        if self._tried(uid, verdict.cause) != verdict.cause:
            _say(f"UID {uid} waits: {verdict.reason}")
        if verdict.cause in _OF_CHANNEL:
            return
        self._try_later(uid)
        if self._is_given_up(uid):
            days = self._age(uid) / DAY
            self._set_aside(mailbox, uid, f"not posted for {days:.1f} days: {verdict.reason}")

    def _try_later(self, uid: int) -> None:
        self._tries[uid] = self._tries.get(uid, 0) + 1
        self._due[uid] = time.time() + min(max(self._age(uid) / 2, SOONEST), LATEST)

    def _age(self, uid: int) -> float:
        """How long (seconds) a mail could not be posted."""
        return time.time() - self._notes.since(uid)

    def _is_given_up(self, uid: int) -> bool:
        """Not if the host was off for days: then it was tried twice."""
        return self._tries.get(uid, 0) >= FEWEST_TRIES and self._age(uid) > GIVEN_UP

    def _tried(self, uid: int, cause: str) -> str | None:
        """Note what a mail waits for, and that it was tried last; what it waited for before."""
        before = self._waiting_for.pop(uid, None)
        self._waiting_for[uid] = cause
        return before

    def _is_up(self) -> None:
        """What Zulip did not take while it took nothing at all is tried again at once."""
        if self._down_since is not None:
            for uid in [uid for uid in self._due if self._notes.since(uid) >= self._down_since]:
                del self._due[uid]
            self._down_since = None

    def _has_to_wait(self, uid: int, waiting: set[str]) -> bool:
        """True for mail to a channel for which a mail waits already."""
        if not waiting or self._is_reply(uid):
            return False
        tokens = {self._config.addresses.token_of(recipient) for recipient in self._mails[uid].recipients}
        return "" in waiting or bool(tokens & waiting)

    def _is_reply(self, uid: int) -> bool:
        book = self._config.addresses
        return all(book.parse(recipient).is_reply for recipient in self._mails[uid].recipients)

    def _remove(self, mailbox: ImapSession, uid: int) -> None:
        mailbox.remove(uid)
        self._forget(uid)

    def _set_aside(self, mailbox: ImapSession, uid: int, why: str) -> None:
        mailbox.set_aside(uid, self._notes)
        self._forget(uid)
        _say(f"UID {uid} is now in {FAILED_FOLDER}: {why}")

    def _forget(self, uid: int) -> None:
        """A mail has left the inbox."""
        self._mails.pop(uid, None)
        self._waiting_for.pop(uid, None)
        self._due.pop(uid, None)
        self._tries.pop(uid, None)
        self._done.discard(uid)
        self._present.discard(uid)


def _say(text: str) -> None:
    """A line for the journal, without whole addresses."""
    os.write(1, (redact(text) + "\n").encode("utf-8", "replace"))
