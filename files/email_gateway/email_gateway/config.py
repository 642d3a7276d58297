"""gateway.conf and what stands beside it, all written by Ansible.

A fault here is never a verdict on a mail: it is raised as Trouble, which defers
the mail and names the file, what was found and what to do.
"""

from __future__ import annotations

import configparser
import json
import re
import urllib.parse
from pathlib import Path
from typing import NamedTuple

from . import address_book, sender_checks
from .address_book import AddressBook
from .addresses import Pattern
from .verdict import Trouble

CONFIG = Path("/etc/zulip-email-gateway/gateway.conf")
# Beside it; also secret.
ADDRESSES = "addresses.json"
_MEND = "run playbooks/site.yml to write it anew"


class Window(NamedTuple):
    """At most `limit` mails in any `seconds` seconds."""

    limit: int
    seconds: float


class Imap(NamedTuple):
    """The inbox. tls: "implicit", "starttls" or "none"; token_endpoint: empty without OAuth 2; largest: what
    Zulip takes of a mail at most (bytes)."""

    server: str
    port: int
    tls: str
    folder: str
    login: str
    token_endpoint: str
    scope: str
    largest: int
    secret: Path | dict[str, str]

    def secrets(self) -> dict[str, str]:
        """What the inbox is opened with: password, or client_id, client_secret and refresh_token.

        From the file only the gateway's user reads, where they were not given.
        """
        if isinstance(self.secret, dict):
            return self.secret
        try:
            found = json.loads(self.secret.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise Trouble("4.3.5", "credential", f"cannot read {self.secret}: {_why(error)}; {_MEND}") from error
        return dict(found)


class Config(NamedTuple):
    """Everything the program is told; times in seconds, sizes in bytes."""

    addresses: AddressBook
    post_automatic: bool
    sender_checks: str
    state_dir: Path
    credential: Path
    url: str
    timeout: float
    logs: Path
    windows: tuple[Window, ...]
    hosts: int
    share: float
    slack: float
    max_wait: float
    asks: bool
    most_queued: int
    quarantine_bytes: int
    quarantine_days: float
    history_mails: int
    imap: Imap | None = None
    system: str = ""
    zulip_version: str = ""

    @property
    def pattern(self) -> Pattern:
        """Zulip's EMAIL_GATEWAY_PATTERN."""
        return self.addresses.pattern

    @property
    def hand_over(self) -> int:
        """Seconds that a delivery may take, once the rate limit admits it."""
        return int(2 * self.timeout) + 25

    @property
    def worker_counts(self) -> bool:
        """True where Zulip's worker counts mail (up to 10), False where its SMTP server does."""
        return not self.url.startswith("smtp:")

    @property
    def queue_errors(self) -> Path:
        """The mail that failed inside Zulip (failures.py)."""
        return self.logs / "queue_error/email_mirror.errors"

    def secret(self) -> str:
        """Zulip's shared secret, from the file only the gateway's user reads."""
        try:
            secret = self.credential.read_text(encoding="ascii").strip()
        except (OSError, UnicodeError) as error:
            raise Trouble("4.3.5", "credential", f"cannot read {self.credential}: {_why(error)}; {_MEND}") from error
        if not secret:
            raise Trouble("4.3.5", "credential", f"{self.credential} is empty; {_MEND}")
        return secret


def load(path: Path = CONFIG) -> Config:
    """Read gateway.conf; raises Trouble with file, finding and remedy."""
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read_string(path.read_text(encoding="utf-8"), source=str(path))
        zulip, pace, quarantine = parser["zulip"], parser["rate_limit"], parser["quarantine"]
        return Config(
            addresses=_addresses(path.with_name(ADDRESSES), Pattern.parse(parser["gateway"]["pattern"])),
            post_automatic=_choice(parser["gateway"], "auto_replies", "drop", "post"),
            sender_checks=_one_of(parser["gateway"], "sender_checks", *sender_checks.MODES),
            state_dir=Path(parser["gateway"]["state_dir"]),
            credential=Path(zulip["credential"]),
            url=_url(zulip["url"]),
            timeout=_positive(zulip["timeout"]),
            logs=Path(zulip["logs"]),
            windows=_windows(pace["windows"], hosts := int(_positive(pace["hosts"]))),
            hosts=hosts,
            share=_positive(pace["share"]),
            slack=_positive(pace["slack"]),
            max_wait=_positive(pace["max_wait"]),
            asks=_choice(parser["policy"], "unknown_addresses", "accept", "ask"),
            most_queued=int(_positive(parser["policy"]["most_queued"])),
            quarantine_bytes=int(_positive(quarantine["max_mib"]) * 2**20),
            quarantine_days=_positive(quarantine["days"]),
            history_mails=int(_positive(parser["history"]["max_mails"])),
            imap=_imap(parser["imap"]) if "imap" in parser else None,
            system=parser["gateway"].get("system", ""),
            zulip_version=zulip.get("version", ""),
        )
    except KeyError as error:
        raise Trouble("4.3.5", "configuration", f"{path} lacks {error.args[0]!r}; {_MEND}") from error
    except (OSError, ValueError, configparser.Error) as error:
        raise Trouble("4.3.5", "configuration", f"cannot use {path}: {_why(error)}; {_MEND}") from error


def _addresses(path: Path, pattern: Pattern) -> AddressBook:
    try:
        return address_book.load(path, pattern)
    except (OSError, ValueError) as error:
        raise Trouble("4.3.5", "configuration", f"cannot use {path}: {_why(error)}; {_MEND}") from error


def _imap(section: configparser.SectionProxy) -> Imap:
    return Imap(
        server=section["server"],
        port=int(_positive(section["port"])),
        tls=section["tls"],
        folder=section["folder"],
        login=section["login"],
        token_endpoint=section["token_endpoint"],
        scope=section["scope"],
        largest=int(_positive(section["largest"])),
        secret=Path(section["secret"]),
    )


def _choice(section: configparser.SectionProxy, name: str, one: str, other: str) -> bool:
    """True for the other."""
    return _one_of(section, name, one, other) == other


def _one_of(section: configparser.SectionProxy, name: str, *values: str) -> str:
    if section[name] not in values:
        raise ValueError(
            f"{name} = {section[name]!r}; write it as {', '.join(map(repr, values[:-1]))} or {values[-1]!r}"
        )
    return section[name]


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise ValueError(f"{text!r} is no positive number")
    return number


def _url(text: str) -> str:
    """Check ``https://127.0.0.1`` (Zulip 10 and earlier) or ``smtp://127.0.0.1:2525`` (later)."""
    url = urllib.parse.urlsplit(text)
    if url.scheme not in ("http", "https", "smtp") or not url.hostname or url.port == 0:
        raise ValueError(f"url = {text!r}; write it as 'https://127.0.0.1' or 'smtp://HOST:PORT'")
    return text


def _windows(text: str, hosts: int) -> tuple[Window, ...]:
    """Parse ``50/60 120/300 600/3600``: mails / seconds, for all `hosts` together."""
    found = [re.fullmatch("([1-9][0-9]*)/([1-9][0-9]*)", part) for part in text.split()]
    if not found or None in found:
        raise ValueError(f"windows = {text!r}; write it as '50/60 120/300 600/3600' (mails/seconds)")
    windows = tuple(Window(int(one[1]), float(one[2])) for one in found if one)
    if min(limit // hosts for limit, _ in windows) < 1:
        raise ValueError(f"windows = {text!r} leave one of {hosts} hosts no mail in a window")
    return windows


def _why(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error).replace("\n", " ")
