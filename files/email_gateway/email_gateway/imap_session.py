"""One IMAP session: the folder that is read, and the one for what cannot be posted.

On imap_tools (Debian's python3-imap-tools), imported here and nowhere else: local
delivery needs no package.
"""

from __future__ import annotations

import imaplib
import re
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, NamedTuple, Protocol

import imap_tools
from imap_tools.errors import ImapToolsError

from . import recipient_field
from .config import Imap
from .oauth import Tokens
from .verdict import Trouble, one_line

FAILED_FOLDER = "Zulip-Failed"
# Ask a server without IDLE this often (seconds).
POLL_INTERVAL = 15.0
# So much of a header is looked at for the recipient, and so much of a mail is in memory (bytes).
_MOST_OF_HEADER, _PIECE = 2**17, 2**20
# One line of an answer to SEARCH is bounded (imaplib, 1,000,000 bytes): so many mails are in one at most.
_MOST_FOUND = 50_000
_NOTHING = re.compile(rb'\bBODY\[[A-Z]*\](<\d+>)? (""|NIL)')
_HEADER = f"BODY.PEEK[HEADER.FIELDS ({' '.join(recipient_field.FIELDS)})]<0.{_MOST_OF_HEADER}>".upper()
_UID, _SIZE = re.compile(rb"\bUID (\d{1,10})\b"), re.compile(rb"\bRFC822\.SIZE (\d{1,20})\b")
# The first of three lists, of the user's own folders: prefix, and what is of no interest here.
_PREFIX = re.compile(rb'\("((?:[^"\\]|\\.)*)"[^()]*(?:\([^()]*\)[^()]*)*\)')
_PERSONAL = re.compile(rb"\((?:" + _PREFIX.pattern + rb")+\)")
# What can go wrong on the way to the server and back.
_BROKEN = (OSError, imaplib.IMAP4.error, ImapToolsError)


class Declined(Trouble):
    """The server has said no to something about one mail; the session goes on."""


class Seen(NamedTuple):
    """A mail, without fetching it: its size (bytes), and of its header what tells its recipients."""

    size: int
    header: bytes


class Copies(Protocol):
    """Remembers which mails were copied, and could not be removed yet."""

    def was_copied(self, uid: int) -> bool: ...
    def copied(self, uid: int) -> None: ...


class ImapSession:
    """A logged-in session; every fault is raised as Trouble.

    timeout: seconds for connecting and for each answer.
    """

    def __init__(self, imap: Imap, tokens: Tokens | None, timeout: float) -> None:
        self._imap = imap
        self._where = f"{imap.server}:{imap.port}"
        self._box = self._connect(timeout)
        try:
            self._log_in(tokens)
            # Which folder it is: UIDVALIDITY alone is the same in many inboxes.
            self.identity = f"{imap.login} {imap.server} {imap.folder} {self._open(imap.folder)}"
            self._capabilities = self._offered()
            _, answer = self._box.client.capability()  # what it can do often differs after the login
            self._capabilities |= set((answer[0] or b"").decode("ascii", "replace").upper().split())
            self._failed_folder = _quoted(self._prefix() + FAILED_FOLDER.encode())
        except BaseException as error:
            self.close()
            if isinstance(error, _BROKEN):
                raise self._trouble(error) from error
            raise

    def close(self) -> None:
        """End the session, politely if that is possible."""
        try:
            self._box.client.sock.settimeout(2)
            self._box.client.logout()
        except _BROKEN:
            self._box.client.shutdown()

    def uids(self, after: int = 0) -> list[int]:
        """The mails in the folder, oldest first; only those with a UID greater than `after`."""
        newer = f"UID {after + 1}:*"
        number = self._number_of_mails()
        if self._next_uid - after <= _MOST_FOUND or number <= _MOST_FOUND:
            found = self._found(newer, "UNDELETED")
        else:
            found = []
            for first in range(1, number + 1, _MOST_FOUND):
                last = first + _MOST_FOUND - 1
                found += self._found(f"{first}:{last if last < number else '*'}", newer, "UNDELETED")
        # Of `n:*` the last mail is always one.
        return sorted(uid for uid in set(found) if uid > after)

    def headers(self, uids: Sequence[int]) -> dict[int, Seen]:
        """What tells of mails to whom they are, by UID; without those that are gone."""
        seen = {}
        answer = self._uid("FETCH", ",".join(map(str, uids)), f"(UID RFC822.SIZE {_HEADER})")
        for text, literal in _items(answer):
            uid, size = _UID.search(text), _SIZE.search(text)
            if uid and size and int(uid[1]) in uids:
                seen[int(uid[1])] = Seen(int(size[1]), literal)
        return seen

    def message(self, uid: int, file: BinaryIO, most: int, step: Callable[[], None]) -> int | None:
        """Write a mail as it came, piece by piece; its size (bytes), None if it is not there. One with more
        than `most` bytes is not read to its end. step: called before each piece."""
        size = 0
        while True:
            step()
            piece = self._part(uid, f"BODY.PEEK[]<{size}.{_PIECE}>")
            if piece is None:
                return None
            file.write(piece)
            size += len(piece)
            # A server that knows no pieces sends all of it.
            if len(piece) != _PIECE or size > most:
                return size

    def with_message_id(self, mark: str) -> list[int]:
        """The mails in the folder that have this Message-ID."""
        return sorted(set(self._found("HEADER", "Message-ID", _quoted(mark.encode()))))

    def half_removed(self) -> list[int]:
        """The mails that are marked as deleted and could be gone."""
        if "UIDPLUS" not in self._capabilities:
            return []
        return sorted(set(self._found("DELETED")))

    def remove(self, uid: int) -> None:
        """Take a mail out of the inbox for good."""
        self._uid("STORE", str(uid), "+FLAGS", r"(\Deleted)")
        self._expunge(uid)

    def set_aside(self, uid: int, copies: Copies) -> None:
        """Move a mail to the folder for what cannot be posted."""
        if "MOVE" in self._capabilities:
            self._make_failed_folder()
            self._uid("MOVE", str(uid), self._failed_folder)
            return
        if not copies.was_copied(uid):
            self._make_failed_folder()
            self._uid("COPY", str(uid), self._failed_folder)
            copies.copied(uid)
        self.remove(uid)

    def wait(self, seconds: float) -> None:
        """Return when something has changed, or after that time."""
        try:
            if "IDLE" in self._capabilities:
                self._box.idle.wait(timeout=seconds)
            else:
                time.sleep(min(seconds, POLL_INTERVAL))
                self._check(self._box.client.noop())
        except _BROKEN as error:
            raise self._trouble(error) from error

    def _connect(self, timeout: float) -> Any:
        imap = self._imap
        # Its name until imap_tools 1.8 was MailBoxTls.
        starttls: Any = getattr(imap_tools, "MailBoxStartTls", None) or getattr(imap_tools, "MailBoxTls", None)
        kind = imap_tools.MailBox if imap.tls == "implicit" else starttls
        try:
            box: Any
            if imap.tls == "none":
                box = imap_tools.MailBoxUnencrypted(imap.server, port=imap.port, timeout=timeout)
            else:
                box = kind(imap.server, port=imap.port, timeout=timeout, ssl_context=_context())
            if not hasattr(box, "client"):
                box.client = box.box  # imap_tools 0.50, Ubuntu 22.04's
            # A connection that died without a word is noticed within two minutes.
            box.client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            box.client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
            box.client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15)
            return box
        except ssl.SSLCertVerificationError as error:
            reason = (
                f"the certificate of {self._where} is not trusted: {error.verify_message}; is that its name? "
                "A private authority's certificate goes into /usr/local/share/ca-certificates, then run "
                "update-ca-certificates"
            )
            raise Trouble("4.7.5", "IMAP certificate", reason) from error
        except (*_BROKEN, ValueError) as error:  # imaplib takes the capabilities for ASCII
            hint = "look at email_gateway_imap_server, email_gateway_imap_port and email_gateway_imap_tls"
            reason = f"cannot connect to {self._where}: {_why(error)}; {hint}"
            raise Trouble("4.4.1", "IMAP connection", reason) from error

    def _log_in(self, tokens: Tokens | None) -> None:
        login = self._imap.login
        try:
            if tokens is None:
                self._log_in_with_password(login, self._imap.secrets()["password"])
                return
            try:
                self._box.xoauth2(login, tokens.access_token(), initial_folder=None)
            except (imaplib.IMAP4.error, ImapToolsError):
                self._box.xoauth2(login, tokens.access_token(anew=True), initial_folder=None)
        except imaplib.IMAP4.abort:
            raise
        except UnicodeError as error:
            what = "has characters that are not ASCII, which LOGIN cannot send"
            reason = f"the login {login} or its password {what}, and {self._where} does not offer AUTH=PLAIN"
            raise Trouble("4.7.8", "IMAP login", reason) from error
        except (imaplib.IMAP4.error, ImapToolsError) as error:
            what = "the password (email_gateway_password)" if tokens is None else "the OAuth 2 token"
            reason = f"{self._where} refuses {what} of {login}: {_why(error)}"
            raise Trouble("4.7.8", "IMAP login", reason) from error

    def _log_in_with_password(self, login: str, password: str) -> None:
        """By SASL where that is offered (RFC 4616): it takes any character, and LOGIN may be disabled."""
        offered = self._offered()
        if "AUTH=PLAIN" in offered:
            sent = f"\0{login}\0{password}".encode()
            self._box.client.authenticate("PLAIN", lambda _: sent)
        elif "LOGINDISABLED" in offered:
            ways = ", ".join(sorted(name for name in offered if name.startswith("AUTH="))) or "nothing"
            reason = f"{self._where} takes no password: it has disabled LOGIN and offers {ways}"
            raise Trouble("4.7.8", "IMAP login", f"{reason}; see OAuth 2 in docs/polling.md")
        else:
            self._box.login(login, password, initial_folder=None)

    def _offered(self) -> set[str]:
        return {str(name).upper() for name in self._box.client.capabilities}

    def _open(self, folder: str) -> int:
        """Select `folder`; its UIDVALIDITY (RFC 3501, 2.3.1.1)."""
        try:
            self._box.folder.set(folder)
        except (imaplib.IMAP4.error, ImapToolsError) as error:
            if isinstance(error, imaplib.IMAP4.abort):
                raise
            reason = f"{self._where} has no folder {folder!r} for {self._imap.login}: {_why(error)}"
            raise Trouble("4.3.5", "IMAP folder", f"{reason}; look at email_gateway_imap_folder") from error
        self._number_told = 0
        _, found = self._box.client.response("UIDNEXT")
        self._next_uid = self._number(found[0] or b"%d" % 2**32)
        _, found = self._box.client.response("UIDVALIDITY")
        return self._number(found[0] or b"0")

    def _number_of_mails(self) -> int:
        """As the server has told the last time."""
        _, told = self._box.client.response("EXISTS")
        if told[-1] is not None:
            self._number_told = self._number(told[-1])
        return self._number_told

    def _prefix(self) -> bytes:
        """Where folders of the user's own may be, "INBOX." for example, as the server writes it (RFC 2342)."""
        if "NAMESPACE" not in self._capabilities:
            return b""
        found, *_ = self._check(self._box.client.namespace())
        if isinstance(found, tuple):  # it came as a literal
            return bytes(found[1]) if found[0].startswith(b"(({") else b""
        personal = _PERSONAL.match(found or b"")
        prefixes = [re.sub(rb"\\(.)", rb"\1", prefix) for prefix in _PREFIX.findall(personal[0] if personal else b"")]
        return min(prefixes, key=lambda prefix: (prefix != b"", not prefix.upper().startswith(b"INBOX")), default=b"")

    def _make_failed_folder(self) -> None:
        client = self._box.client
        try:
            if self._check(client.list('""', self._failed_folder)) in ([None], []):
                self._check(client.create(self._failed_folder))
        except (imaplib.IMAP4.abort, OSError) as error:
            raise self._trouble(error) from error
        except (imaplib.IMAP4.error, ImapToolsError) as error:
            name = self._failed_folder.decode("ascii", "replace")
            reason = f"{self._where} declines to make the folder {name}: {_why(error)}"
            raise Declined("4.4.2", "IMAP declined", reason) from error

    def _expunge(self, uid: int) -> None:
        # Without UIDPLUS (RFC 4315) a mail stays marked as deleted, and so out of
        # sight, rather than that others' deleted mail goes with it.
        if "UIDPLUS" in self._capabilities:
            self._uid("EXPUNGE", str(uid))

    def _found(self, *criteria: str | bytes) -> list[int]:
        """The UIDs of what SEARCH finds; a server may answer in several lines."""
        return [self._number(word) for line in self._uid("SEARCH", *criteria) for word in (line or b"").split()]

    def _number(self, word: bytes) -> int:
        if not re.fullmatch(rb"[0-9]{1,20}", word):
            raise self._trouble(ValueError(f"{word[:60]!r} is no number"))
        return int(word)

    def _part(self, uid: int, part: str) -> bytes | None:
        for found in self._uid("FETCH", str(uid), f"({part})"):
            if isinstance(found, tuple):
                return bytes(found[1])
            if isinstance(found, bytes) and _NOTHING.search(found):
                return b""  # behind the end
        return None

    def _uid(self, command: str, *arguments: str | bytes) -> list[Any]:
        # imaplib keeps what came before a NO, and would take it for the next answer.
        for kind in ("FETCH", "SEARCH"):
            self._box.client.response(kind)
        try:
            return self._check(self._box.client.uid(command, *arguments))
        except (imaplib.IMAP4.abort, OSError) as error:
            raise self._trouble(error) from error
        except imaplib.IMAP4.error as error:
            reason = f"{self._where} declines {command}: {_why(error)}"
            raise Declined("4.4.2", "IMAP declined", reason) from error

    @staticmethod
    def _check(answer: tuple[str, list[Any]]) -> list[Any]:
        status, data = answer
        if status != "OK":
            raise imaplib.IMAP4.error(f"{status} {data!r}")
        return data

    def _trouble(self, error: BaseException) -> Trouble:
        return Trouble("4.4.2", "IMAP session", f"the session with {self._where} broke: {_why(error)}")


def _context() -> ssl.SSLContext:
    """As Python did until 3.12: certificates of many a private authority lack what 3.13 asks for."""
    context = ssl.create_default_context()
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context


def _quoted(name: bytes) -> bytes:
    """A mailbox's name as a quoted string (RFC 3501, 4.3)."""
    return b'"' + re.sub(rb'(["\\])', rb"\\\1", name) + b'"'


def _items(answer: Sequence[Any]) -> list[tuple[bytes, bytes]]:
    """What FETCH tells of each mail: the text around its literal, and the literal (empty without one)."""
    items: list[tuple[bytes, bytes]] = []
    for part in answer:
        if isinstance(part, tuple):
            items.append((part[0], bytes(part[1])))
        elif isinstance(part, bytes) and re.match(rb"\d+ \(", part):
            items.append((part, b""))
        elif isinstance(part, bytes) and items:  # what follows the literal
            items[-1] = (items[-1][0] + part, items[-1][1])
    return items


def _why(error: BaseException) -> str:
    """The server's own words where there are any."""
    text = str(error.args[0] if error.args and isinstance(error.args[0], bytes) else error)
    if isinstance(error, ImapToolsError):
        found = re.search(r"\[b(['\"])(.*?)\1\]", text)
        text = found[2] if found else text
    return one_line(re.sub(r"^b'(.*)'$", r"\1", text) or type(error).__name__, 300)
