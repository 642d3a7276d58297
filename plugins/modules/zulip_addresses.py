#!/usr/bin/python
"""Ansible module: which of Zulip's addresses aliases lead to, and who may write to them. Reads, never writes."""

from __future__ import annotations

import base64
import http.client
import json
import re
import ssl
import time
import urllib.parse
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from typing import Any, NamedTuple

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: zulip_addresses
short_description: Which of Zulip's addresses aliases lead to
description:
  - Finds the addresses of channels by their names through Zulip's API, and checks what the operator has written.
  - Fails with the variable and what is wrong with it. Changes nothing.
options:
  aliases:
    description: email_gateway_aliases, by name; or C(channels) for one alias for each channel.
    type: raw
    required: true
  channel_senders:
    description: email_gateway_channel_senders, by channel.
    type: dict
    default: {}
  blocked:
    description: email_gateway_blocked_senders.
    type: list
    elements: str
    default: []
  former:
    description: email_gateway_former_mailnames.
    type: list
    elements: str
    default: []
  pattern:
    description: EMAIL_GATEWAY_PATTERN.
    type: str
    required: true
  probe:
    description: email_gateway_probe_address.
    type: str
    default: ""
  alerts:
    description: email_gateway_alert_channel.
    type: str
    default: ""
  sends_from:
    description: The addresses that Zulip sends from.
    type: list
    elements: str
    default: []
  version:
    description: ZULIP_VERSION; empty if it is not known.
    type: str
    default: ""
  url:
    description: Zulip's web server; needed where a channel is given by name.
    type: str
    default: ""
  host:
    description: By which name Zulip is asked there (EXTERNAL_HOST), if not the one in O(url).
    type: str
    default: ""
  email:
    description: Whose API key it is.
    type: str
    default: ""
  key:
    description: The API key.
    type: str
    default: ""
  has_pattern:
    description: Whether Zulip has its EMAIL_GATEWAY_PATTERN already; otherwise what it does not tell yet is left out.
    type: bool
    default: true
author: The Zulip email gateway maintainers
"""

EXAMPLES = r"""
- name: Find what the aliases lead to
  zulip_addresses:
    aliases: {support: "#support"}
    pattern: "%s@mail.example.com"
    url: https://127.0.0.1
    host: chat.example.com
    email: gateway-bot@chat.example.com
    key: "{{ vault_email_gateway_zulip_api_key }}"
  register: addresses
  no_log: true
"""

RETURN = r"""
addresses:
  description: What the gateway reads in addresses.json. There are secrets in it.
  type: dict
  returned: success
waits:
  description: Whether something was left out.
  type: bool
  returned: success
remarks:
  description: What the operator should know.
  type: list
  elements: str
  returned: success
"""

TOKEN = "[0-9a-f]{32}"
OPTIONS = ("show-sender", "include-footer", "include-quotes", "prefer-text", "prefer-html")
# As in the program (addresses.py); a test compares the two.
CHANNEL = re.compile(
    rf"[a-z0-9_-]+[.+]{TOKEN}([.+][a-z0-9-]+)*|{TOKEN}([.+]({'|'.join(OPTIONS)}))*",
)
NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?")
# Somebody else's at every mail domain (RFC 2142), or a user of the host whose mail comes there.
RESERVED = ("postmaster", "abuse", "mailer-daemon", "root", "zulip")
SENDER = re.compile(r"[^\s@<>,;]*@[^\s@<>,;]+")
MAILNAME = re.compile(r"([a-z0-9]([a-z0-9-]*[a-z0-9])?\.)+[a-z]([a-z0-9-]*[a-z0-9])?")
FIELDS = {"to", "senders", "options", "as"}
CHANNELS = "channels"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# The first release whose addresses post as a given bot, and the first that tells a channel's address at all.
POSTS_AS, TELLS = 10, 8
# Zulip allows 200 requests a minute: who makes more is told to wait (seconds).
PATIENCE = 300.0
# A web server that is being restarted has so long, and an answer is no longer (seconds, bytes).
RESTART, MOST = 60.0, 2**24


class Unfit(Exception):
    """Something that the operator has to change."""


class NotYet(Exception):
    """Zulip tells no address of the gateway's pattern; says what it tells."""


class Zulip:
    """Zulip's API, with one connection. Raises Unfit."""

    def __init__(self, url: str, host: str, email: str, key: str, version: str) -> None:
        self._where = urllib.parse.urlsplit(url)
        self._host = host or self._where.hostname or ""
        self._login = base64.b64encode(f"{email}:{key}".encode()).decode()
        self._is_set = {"email_gateway_zulip_api_email": email, "email_gateway_zulip_api_key": key}
        self._version = version
        self._email = email
        self._connection: http.client.HTTPConnection | None = None

    def is_older_than(self, release: int) -> bool:
        return bool(self._version) and int(re.split(r"\D", self._version)[0]) < release

    def version(self) -> str:
        return self._version

    def channels(self, what: str) -> list[str]:
        """The names of all channels that the bot can see, the oldest first."""
        found = self._get("/streams", what)["streams"]
        return [str(channel["name"]) for channel in sorted(found, key=lambda channel: channel["stream_id"])]

    def address(self, channel: str, sender: str, what: str) -> str:
        """A channel's address, by its name. sender: as whom its mail is posted, if not as the gateway's bot."""
        number = self._get(f"/get_stream_id?{urllib.parse.urlencode({'stream': channel})}", what)["stream_id"]
        query = ""
        if sender:
            user = self._get(f"/users/{urllib.parse.quote(sender)}", what)["user"]["user_id"]
            query = f"?sender_id={user}"
        return str(self._get(f"/streams/{number}/email_address{query}", what)["email"])

    def _get(self, path: str, what: str) -> dict[str, Any]:
        missing = [name for name, value in self._is_set.items() if not value]
        if missing:
            names = " and ".join(missing) + (" is" if len(missing) == 1 else " are")
            raise Unfit(
                f"{what} needs Zulip's API, but {names} not set. "
                "Set both to those of a bot of your Zulip (the key from Ansible Vault), or write the channel's address"
            )
        if not self._where.hostname:
            raise Unfit(
                f"{what} needs Zulip's API; set email_gateway_zulip_api_url, for example https://chat.example.com"
            )
        if self._where.scheme == "http" and self._where.hostname not in LOOPBACK:
            raise Unfit(
                f"email_gateway_zulip_api_url is {self._where.geturl()}, by which the API key would be sent in the "
                "clear; write https://"
            )
        if self.is_older_than(TELLS):
            raise Unfit(f"{what}: Zulip {self._version} does not tell channels' addresses; write the address itself")
        began = time.monotonic()
        while True:
            status, answer = self._answer(path)
            waited = time.monotonic() - began
            if status == 429 and waited < PATIENCE:
                time.sleep(min(float(answer.get("retry-after", 1)) + 0.1, 60.0))
            elif answer or waited > RESTART:
                break
            else:  # it may have been restarted just now
                time.sleep(0.5)
        if not answer:
            said = f"answers {status} without JSON" if status else "does not answer"
            raise Unfit(f"{what} needs Zulip's API, but {self._where.geturl()} {said}; look at Zulip's web server")
        if answer.get("result") != "success":
            said = f"{status} {json.dumps(answer.get('msg', ''))}"
            raise Unfit(f"{what}: Zulip's API answers {said} to {self._email} for {path.partition('?')[0]}")
        return answer

    def _answer(self, path: str) -> tuple[int, dict[str, Any]]:
        """The status, 0 for none, and the JSON object, an empty one for none."""
        headers = {"Host": self._host, "Authorization": f"Basic {self._login}", "User-Agent": "zulip-email-gateway"}
        connection = self._connection or self._connected()
        self._connection = None
        try:
            connection.request("GET", f"/api/v1{path}", headers=headers)
            response = connection.getresponse()
            found = json.loads(response.read(MOST))
        except ssl.SSLCertVerificationError as error:
            raise Unfit(
                f"email_gateway_zulip_api_url: the certificate of {self._where.geturl()} is not good: "
                f"{error.verify_message}. Write the URL as the certificate has it, or let this host trust its issuer"
            ) from error
        except (OSError, http.client.HTTPException):
            return 0, {}
        except ValueError:
            return response.status, {}
        self._connection = connection
        return response.status, found if isinstance(found, dict) else {}

    def _connected(self) -> http.client.HTTPConnection:
        assert self._where.hostname
        if self._where.scheme == "http":
            return http.client.HTTPConnection(self._where.hostname, self._where.port, timeout=30)
        context = ssl.create_default_context()
        if self._where.hostname == "127.0.0.1":  # by a self-signed certificate, or one for another name
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        return http.client.HTTPSConnection(self._where.hostname, self._where.port, timeout=30, context=context)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()


class Pattern(NamedTuple):
    """EMAIL_GATEWAY_PATTERN, taken apart."""

    prefix: str
    domain: str

    @classmethod
    def of(cls, text: str) -> Pattern:
        prefix, _, domain = text.partition("%s@")
        return cls(prefix, domain)

    def local(self, address: str) -> str:
        """What stands for %s in an address of the pattern, or alone."""
        local, at, domain = address.lower().rpartition("@")
        if not at:
            return domain
        return local[len(self.prefix) :] if domain == self.domain and local.startswith(self.prefix) else ""


class Alias(NamedTuple):
    """What the operator has written; what: where, for messages."""

    what: str
    name: str
    to: str
    senders: list[str] | None = None
    options: list[str] | None = None
    posts_as: str = ""


def written(aliases: dict[str, Any]) -> list[Alias]:
    """What the operator has written; raises Unfit for what is no alias."""
    found = list[Alias]()
    for name, value in aliases.items():
        what = f"email_gateway_aliases: {name}"
        fields = {"to": value} if isinstance(value, str) else value
        if not isinstance(fields, dict) or not isinstance(fields.get("to"), str) or set(fields) - FIELDS:
            raise Unfit(
                f'{what} is {json.dumps(value)}; write "#channel", an address, or to: with senders:, options: and as:'
            )
        senders, options = (strings(what, name, fields.get(name)) for name in ("senders", "options"))
        posts_as = str(fields.get("as") or "")
        found.append(Alias(what, str(name).lower(), fields["to"].strip(), senders, options, posts_as))
    return found


def strings(what: str, name: str, value: Any) -> list[str] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise Unfit(f"{what} has {name}: {json.dumps(value)}; write a list of texts")
    return value


def check_name(name: str, what: str, sends_from: Iterable[str], pattern: Pattern) -> None:
    """Whether an alias can have that name; raises Unfit."""
    if not NAME.fullmatch(name):
        raise Unfit(f"{what} is no local part of an address; write letters, digits, '-', '_' and '.', as in support")
    if name in ("true", "false"):
        raise Unfit(f'{what} is what YAML makes of yes, no, on or off; write the name in quotes, as in "on"')
    if re.search(TOKEN, name):
        raise Unfit(f"{what} looks like one of Zulip's own addresses; give the alias another name")
    own = [address.lower().partition("@")[0].split("{")[0].rstrip("-+.") for address in sends_from]
    if not pattern.prefix and (name in RESERVED or any(name == one or name.startswith(f"{one}-") for one in own)):
        raise Unfit(f"{what} is reserved at every mail domain, or an address that Zulip sends from; take another name")


def listed(what: str, entries: list[str]) -> list[str]:
    """Senders as they may stand in a list; raises Unfit."""
    for entry in entries:
        if not SENDER.fullmatch(entry):
            raise Unfit(
                f'{what} has {json.dumps(entry)}; write "user@example.com", or "@example.com" for a whole domain'
            )
    return [entry.lower() for entry in entries]


def target(alias: Alias, zulip: Zulip, pattern: Pattern) -> str:
    """The local part that an alias leads to; raises Unfit and NotYet."""
    if alias.posts_as and not alias.to.startswith("#"):
        raise Unfit(f'{alias.what} has as:, for which "to" has to be the name of a channel, as in "#ops"')
    if alias.posts_as and zulip.is_older_than(POSTS_AS):
        raise Unfit(f"{alias.what} has as:, which needs Zulip {POSTS_AS} or later; this is {zulip.version()}")
    if alias.to.startswith("#"):
        address = zulip.address(alias.to[1:], alias.posts_as, alias.what)
        local = pattern.local(address)
        if not CHANNEL.fullmatch(local):
            told = f"an address at {address.rpartition('@')[2]}" if address else "no address"
            wanted = f"{pattern.prefix}%s@{pattern.domain}"
            what = f"its EMAIL_GATEWAY_PATTERN has to be {wanted}. Set it there, and restart Zulip"
            raise NotYet(f"{alias.what}: Zulip tells {told}, but {what}")
    else:
        local = pattern.local(alias.to)
        if not CHANNEL.fullmatch(local):
            raise Unfit(
                f"{alias.what} leads to {json.dumps(re.sub(TOKEN, 'TOKEN', alias.to))}, which is no channel's address "
                f"at {pattern.domain}; copy it from Zulip, or write the name of the channel with # before it"
            )
    if alias.options is None:
        return local
    unknown = [option for option in alias.options if option not in OPTIONS]
    if unknown:
        raise Unfit(f"{alias.what} has options: {json.dumps(unknown)}; Zulip knows {', '.join(OPTIONS)}")
    parts = [part for part in re.split("[.+]", local) if part not in OPTIONS]
    return ".".join([*parts, *alias.options])


def shown(to: str, local: str) -> dict[str, str]:
    """An alias as it stands in addresses.json; to: as it was written. What is shown has no token in it."""
    return {
        "to": local,
        "channel": to if to.startswith("#") else re.sub(r"([0-9a-f]{4})[0-9a-f]{28}", r"\1...", to.lower()),
    }


def token_in(local: str) -> str:
    """By what Zulip knows the channel."""
    parts = [part for part in re.split("[.+]", local) if part not in OPTIONS]
    return parts[min(len(parts), 2) - 1]


def of_channels(zulip: Zulip, pattern: Pattern, sends_from: list[str], remarks: list[str]) -> dict[str, dict[str, str]]:
    """An alias for each channel that the bot can see, by the name Zulip gives it in its address."""
    found, whose = dict[str, dict[str, str]](), dict[str, str]()
    what = f"email_gateway_aliases: {CHANNELS}"
    for channel in zulip.channels(what):
        local = target(Alias(what, channel, f"#{channel}"), zulip, pattern)
        name = re.split("[.+]", local)[0]
        if re.fullmatch(TOKEN, name):
            remarks.append(f"#{channel} has no alias: its name has nothing that can stand in an address")
            continue
        try:
            check_name(name, f"{what}: {name}", sends_from, pattern)
        except Unfit as why:
            remarks.append(f"#{channel} has no alias: {why}")
            continue
        if name in found:
            remarks.append(f"#{channel} has no alias: {name} is that of #{whose[name]}, which is older")
            continue
        found[name], whose[name] = shown(f"#{channel}", local), channel
    return found


def zulip_addresses(options: dict[str, Any], zulip: Zulip) -> dict[str, Any]:
    """Everything the module returns; raises Unfit."""
    pattern, sends_from, remarks = Pattern.of(options["pattern"]), options["sends_from"], list[str]()
    targets, senders = dict[str, dict[str, str]](), dict[str, list[str]]()
    waits = False

    @contextmanager
    def perhaps_later() -> Iterator[None]:
        nonlocal waits
        try:
            yield
        except NotYet as why:
            if options["has_pattern"]:
                raise Unfit(str(why)) from why
            waits = True

    if options["aliases"] == CHANNELS:
        with perhaps_later():
            targets = of_channels(zulip, pattern, sends_from, remarks)
    elif isinstance(options["aliases"], dict):
        aliases = written(options["aliases"])
        for alias in aliases:
            check_name(alias.name, alias.what, sends_from, pattern)
            if sum(other.name == alias.name for other in aliases) > 1:
                raise Unfit(f"{alias.what} appears twice; addresses do not differ in capitals")
            if alias.senders is not None:
                senders[alias.name] = listed(alias.what, alias.senders)
        for alias in aliases:
            with perhaps_later():
                targets[alias.name] = shown(alias.to, target(alias, zulip, pattern))
    else:
        raise Unfit(
            f"email_gateway_aliases is {json.dumps(options['aliases'])}; write a name for each address, as in "
            f'support: "#support", or {CHANNELS}'
        )
    for channel, entries in options["channel_senders"].items():
        what = f"email_gateway_channel_senders: {channel}"
        if not isinstance(entries, list):
            raise Unfit(f"{what} is {json.dumps(entries)}; write a list of senders")
        listed_here = listed(what, [str(entry) for entry in entries])
        with perhaps_later():
            token = token_in(target(Alias(what, channel, channel), zulip, pattern))
            if token in senders:
                raise Unfit(f"{what} is a channel that has a list already; write one list for it")
            senders[token] = listed_here
    return {
        "addresses": {
            "former": [former_pattern(text, pattern) for text in options["former"]],
            "aliases": targets,
            "senders": senders,
            "blocked": listed("email_gateway_blocked_senders", options["blocked"]),
            "probe": own("email_gateway_probe_address", options["probe"], targets, pattern, waits),
            "alerts": own("email_gateway_alert_channel", options["alerts"], targets, pattern, waits),
            "sends_from": [address for address in sends_from if address.lower().endswith(f"@{pattern.domain}")],
        },
        "waits": waits,
        "remarks": remarks,
    }


def own(name: str, text: str, aliases: Iterable[str], pattern: Pattern, waits: bool) -> str:
    """The address that the gateway itself writes to; raises Unfit. waits: not all aliases are known yet."""
    local = pattern.local(text)
    if text and local not in aliases and not CHANNEL.fullmatch(local) and not waits:
        shown_here = json.dumps(re.sub(TOKEN, "TOKEN", text))
        what = f"which is neither an alias nor a channel's address at {pattern.domain}"
        raise Unfit(f"{name} is {shown_here}, {what}")
    return f"{pattern.prefix}{local}@{pattern.domain}" if text else ""


def former_pattern(text: str, pattern: Pattern) -> str:
    """A mail domain that was, or a whole pattern; raises Unfit."""
    former = text if "%s@" in text else f"{pattern.prefix}%s@{text}"
    prefix, domain = Pattern.of(former)
    if not MAILNAME.fullmatch(domain) or not re.fullmatch(r"[a-z0-9_.+-]*", prefix):
        raise Unfit(
            f"email_gateway_former_mailnames has {json.dumps(text)}; write a mail domain as old.example.com, or a "
            'whole pattern as "user+%s@old.example.com", in lower case'
        )
    if Pattern(prefix, domain) == pattern:
        raise Unfit(f"email_gateway_former_mailnames has {json.dumps(text)}, which is the current one; take it out")
    return former


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "aliases": {"type": "raw", "required": True},
            "channel_senders": {"type": "dict", "default": {}},
            "blocked": {"type": "list", "elements": "str", "default": []},
            "former": {"type": "list", "elements": "str", "default": []},
            "pattern": {"type": "str", "required": True},
            "sends_from": {"type": "list", "elements": "str", "default": []},
            "version": {"type": "str", "default": ""},
            "url": {"type": "str", "default": ""},
            "host": {"type": "str", "default": ""},
            "email": {"type": "str", "default": ""},
            "key": {"type": "str", "default": "", "no_log": True},
            "has_pattern": {"type": "bool", "default": True},
            "probe": {"type": "str", "default": ""},
            "alerts": {"type": "str", "default": ""},
        },
        supports_check_mode=True,
    )
    options = module.params
    zulip = Zulip(*(options[name] for name in ("url", "host", "email", "key", "version")))
    try:
        with closing(zulip):
            module.exit_json(changed=False, **zulip_addresses(options, zulip))
    except Unfit as error:
        module.fail_json(msg=str(error))


if __name__ == "__main__":
    main()
