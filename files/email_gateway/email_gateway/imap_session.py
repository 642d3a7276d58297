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
from typing import Any, BinaryIO

import imap_tools
from imap_tools.errors import ImapToolsError

from .config import Imap
from .oauth import Tokens
from .verdict import Trouble, one_line

FAILED_FOLDER = "Zulip-Failed"
# Ask a server without IDLE this often (seconds).
POLL_INTERVAL = 15.0
# So much of a header is looked at for the recipient, and so much of a mail is in memory (bytes).
_MOST_OF_HEADER, _PIECE = 2**17, 2**20
_NOTHING = re.compile(rb'\bBODY\[[A-Z]*\](<\d+>)? (""|NIL)')
# What can go wrong on the way to the server and back.
_BROKEN = (OSError, imaplib.IMAP4.error, ImapToolsError)


class Declined(Trouble):
    """The server has said no to something about one mail; the session goes on."""


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
            self._capabilities = {str(name).upper() for name in self._box.client.capabilities}
            _, answer = self._box.client.capability()  # what it can do often differs after the log in
            self._capabilities |= set((answer[0] or b"").decode("ascii", "replace").upper().split())
            self._failed_folder = self._prefix() + FAILED_FOLDER
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

    def uids(self) -> list[int]:
        """The mails in the folder, oldest first."""
        return self._found("UNDELETED")

    def header(self, uid: int) -> bytes | None:
        """The beginning of a mail's header; None if the mail is gone."""
        return self._part(uid, f"BODY.PEEK[HEADER]<0.{_MOST_OF_HEADER}>")

    def message(self, uid: int, file: BinaryIO) -> int | None:
        """Write a mail as it came, piece by piece; its size (bytes), None if it is gone."""
        size = 0
        while True:
            piece = self._part(uid, f"BODY.PEEK[]<{size}.{_PIECE}>")
            if piece is None:
                return None
            file.write(piece)
            size += len(piece)
            if len(piece) < _PIECE:
                return size

    def half_removed(self) -> list[int]:
        """The mails that are marked as deleted and could be gone."""
        if "UIDPLUS" not in self._capabilities:
            return []
        return self._found("DELETED")

    def remove(self, uid: int) -> None:
        """Take a mail out of the inbox for good."""
        self._uid("STORE", str(uid), "+FLAGS", r"(\Deleted)")
        self._expunge(uid)

    def set_aside(self, uid: int) -> None:
        """Move a mail to the folder for what cannot be posted."""
        self._make_failed_folder()
        if "MOVE" in self._capabilities:
            self._uid("MOVE", str(uid), self._failed_folder)
        else:
            self._uid("COPY", str(uid), self._failed_folder)
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
            box: Any = kind(imap.server, port=imap.port, timeout=timeout, ssl_context=ssl.create_default_context())
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
                self._box.login(login, self._imap.secrets()["password"], initial_folder=None)
                return
            try:
                self._box.xoauth2(login, tokens.access_token(), initial_folder=None)
            except (imaplib.IMAP4.error, ImapToolsError):
                self._box.xoauth2(login, tokens.access_token(anew=True), initial_folder=None)
        except imaplib.IMAP4.abort:
            raise
        except UnicodeError as error:
            reason = f"the login {login} or its password has characters that are not ASCII; IMAP's LOGIN takes none"
            raise Trouble("4.7.8", "IMAP log in", reason) from error
        except (imaplib.IMAP4.error, ImapToolsError) as error:
            what = "the password (email_gateway_password)" if tokens is None else "the OAuth 2 token"
            reason = f"{self._where} refuses {what} of {login}: {_why(error)}"
            raise Trouble("4.7.8", "IMAP log in", reason) from error

    def _open(self, folder: str) -> int:
        """Select `folder`; its UIDVALIDITY (RFC 3501, 2.3.1.1)."""
        try:
            self._box.folder.set(folder)
        except (imaplib.IMAP4.error, ImapToolsError) as error:
            if isinstance(error, imaplib.IMAP4.abort):
                raise
            reason = f"{self._where} has no folder {folder!r} for {self._imap.login}: {_why(error)}"
            raise Trouble("4.3.5", "IMAP folder", f"{reason}; look at email_gateway_imap_folder") from error
        _, found = self._box.client.response("UIDVALIDITY")
        return self._number(found[0] or b"0")

    def _prefix(self) -> str:
        """Where folders of the user's own may be, "INBOX." for example (RFC 2342)."""
        if "NAMESPACE" not in self._capabilities:
            return ""
        found, *_ = self._check(self._box.client.namespace())
        personal = re.match(rb'\(\("([^"]*)"', found or b"")
        return personal[1].decode("ascii", "replace") if personal else ""

    def _make_failed_folder(self) -> None:
        try:
            if not self._box.folder.exists(self._failed_folder):
                self._box.folder.create(self._failed_folder)
        except (imaplib.IMAP4.abort, OSError) as error:
            raise self._trouble(error) from error
        except (imaplib.IMAP4.error, ImapToolsError) as error:
            reason = f"{self._where} declines to make the folder {self._failed_folder}: {_why(error)}"
            raise Declined("4.4.2", "IMAP declined", reason) from error

    def _expunge(self, uid: int) -> None:
        # Without UIDPLUS (RFC 4315) a mail stays marked as deleted, and so out of
        # sight, rather than that others' deleted mail goes with it.
        if "UIDPLUS" in self._capabilities:
            self._uid("EXPUNGE", str(uid))

    def _found(self, criterion: str) -> list[int]:
        """The UIDs of what SEARCH finds, in ascending order."""
        found, *_ = self._uid("SEARCH", criterion)
        return sorted(self._number(word) for word in (found or b"").split())

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

    def _uid(self, *command: str) -> list[Any]:
        # imaplib keeps what came before a NO, and would take it for the next answer.
        for kind in ("FETCH", "SEARCH"):
            self._box.client.response(kind)
        try:
            return self._check(self._box.client.uid(*command))
        except (imaplib.IMAP4.abort, OSError) as error:
            raise self._trouble(error) from error
        except imaplib.IMAP4.error as error:
            reason = f"{self._where} declines {command[0]}: {_why(error)}"
            raise Declined("4.4.2", "IMAP declined", reason) from error

    @staticmethod
    def _check(answer: tuple[str, list[Any]]) -> list[Any]:
        status, data = answer
        if status != "OK":
            raise imaplib.IMAP4.error(f"{status} {data!r}")
        return data

    def _trouble(self, error: BaseException) -> Trouble:
        return Trouble("4.4.2", "IMAP session", f"the session with {self._where} broke: {_why(error)}")


def _why(error: BaseException) -> str:
    """The server's own words where there are any."""
    text = str(error.args[0] if error.args and isinstance(error.args[0], bytes) else error)
    if isinstance(error, ImapToolsError):
        found = re.search(r"\[b(['\"])(.*?)\1\]", text)
        text = found[2] if found else text
    return one_line(re.sub(r"^b'(.*)'$", r"\1", text) or type(error).__name__, 300)
