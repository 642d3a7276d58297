"""Ansible action: where the mail of a domain goes, and whether that is this host.

Asks DNS on the controller, as a sending mail server does (RFC 5321, 5.1), and compares the answer with the
names and addresses of the host. Never fails: what is wrong stands in the result. Answers within 12 seconds,
also when no name server does.

Arguments: C(domain), the mail domain; C(fqdn), the host's own name; C(here), all names and addresses by which
an MX record can mean the host; C(servers), name servers to ask, as ADDRESS, ADDRESS:PORT or [ADDRESS]:PORT
(none: the controller's own).
Result: C(records), the MX records as dig +short shows them; C(fault), what keeps mail from the host, or "";
C(remarks), what else an operator should know; C(address), where a sender connects to, or "".
"""

from __future__ import annotations

import ipaddress
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from ansible.plugins.action import ActionBase

try:
    import dns.exception
    import dns.resolver
    import dns.reversename
except ImportError:
    dns = None  # type: ignore[assignment]

# Seconds for everything, and for one question; a name server that is a neighbour of its client
# answers within a few milliseconds, one on the other side of the world within one second.
LIFETIME = 12.0
QUESTION = 5.0


class Unfit(Exception):
    """Why the question cannot be answered."""


class Exchanger(NamedTuple):
    """A host that takes a domain's mail; `addresses` are in the order in which DNS gave them."""

    preference: int
    host: str
    canonical: str
    addresses: list[str]

    def means(self, own: set[str]) -> bool:
        """Whether it is the host with these names and addresses."""
        return bool(own & {self.host, self.canonical, *self.addresses})

    def __str__(self) -> str:
        through = f", an alias of {self.canonical}" if self.canonical != self.host else ""
        return f"{self.host} ({', '.join(self.addresses) or 'no address'}{through})"


class Mail(NamedTuple):
    """What DNS says of a domain's mail. `records` is empty where the domain's own address takes its place."""

    domain: str
    canonical: str
    exists: bool
    records: list[str]
    exchangers: list[Exchanger]

    @property
    def first(self) -> list[Exchanger]:
        """Those that are asked first, in any order."""
        return [one for one in self.exchangers if one.preference == self.exchangers[0].preference]


class Dns:
    """Questions to DNS within one limit of time."""

    def __init__(self, servers: Sequence[str]) -> None:
        if dns is None:
            raise Unfit(
                "The MX check needs the Python library dnspython on the machine that runs Ansible; install it with "
                f"{sys.executable} -m pip install dnspython, or set email_gateway_mx_check: skip"
            )
        self.end = time.monotonic() + LIFETIME
        try:
            self.resolver = dns.resolver.Resolver(configure=not servers)
        except dns.exception.DNSException as error:
            raise Unfit(
                f"The machine that runs Ansible has no name server to ask for the MX record: {error}"
            ) from error
        if servers:
            parts = [server_of(server) for server in servers]
            self.resolver.nameservers = [address for address, _ in parts]
            self.resolver.nameserver_ports = dict(parts)
        self.resolver.timeout = 2.0
        self.servers = ", ".join(servers) or ", ".join(str(server) for server in self.resolver.nameservers)

    def ask(self, name: str, kind: str) -> tuple[str, list[Any], bool]:
        """The canonical name, the records, and whether the name exists; raises Unfit without an answer."""
        lifetime = min(QUESTION, self.end - time.monotonic())
        try:
            if lifetime <= 0:
                raise dns.exception.Timeout
            answer = self.resolver.resolve(name + ".", kind, raise_on_no_answer=False, lifetime=lifetime)
        except dns.resolver.NXDOMAIN:
            return name, [], False
        except dns.exception.Timeout:
            raise Unfit(f"no name server answered (asked {self.servers} for the {kind} record of {name})") from None
        except dns.exception.DNSException as error:
            why = " ".join(str(error).split())
            raise Unfit(f"the name servers cannot tell the {kind} record of {name}: {why}") from error
        return plain(answer.canonical_name), list(answer), True

    def exchanger(self, preference: int, host: str) -> Exchanger:
        canonical, found, _ = self.ask(host, "A")
        try:
            found += self.ask(host, "AAAA")[1]
        except Unfit:
            if not found:
                raise
        return Exchanger(preference, host, canonical, [record.address for record in found])

    def names_back(self, address: str) -> list[str]:
        """The names in the PTR records of an address; without those that are other addresses' names."""
        _, found, _ = self.ask(plain(dns.reversename.from_address(address)), "PTR")
        kind = "AAAA" if ":" in address else "A"
        names = [plain(record.target) for record in found]
        return [name for name in names if address in {record.address for record in self.ask(name, kind)[1]}]

    def mail(self, domain: str) -> Mail:
        """Where a sender takes the mail of a domain (RFC 5321, 5.1)."""
        canonical, found, exists = self.ask(domain, "MX")
        found.sort(key=lambda record: (record.preference, record.exchange))
        records = [f"{record.preference} {plain(record.exchange) or '.'}" for record in found]
        exchangers = []
        for record in found:
            host = plain(record.exchange)
            try:
                exchangers += [self.exchanger(record.preference, host)] if host else []
            except Unfit:
                # Of those that are asked later it does not matter.
                if record.preference == found[0].preference:
                    raise
                exchangers.append(Exchanger(record.preference, host, host, []))
        if not found and exists:
            own = self.exchanger(0, domain)
            exchangers = [own] if own.addresses else []
        return Mail(domain, canonical, exists, records, exchangers)


def server_of(text: str) -> tuple[str, int]:
    """ADDRESS, ADDRESS:PORT or [ADDRESS]:PORT as address and port; raises Unfit."""
    host, port = text.strip(), "53"
    if host.startswith("[") and "]" in host:
        host, _, rest = host[1:].partition("]")
        port = rest.removeprefix(":") or port
    elif host.count(":") == 1:
        host, _, port = host.partition(":")
    try:
        if not port.isdigit() or not 0 < int(port) < 65536:
            raise ValueError
        return str(ipaddress.ip_address(host)), int(port)
    except ValueError:
        raise Unfit(
            f"email_gateway_dns_servers has {text!r}, which is not the address of a name server; write it as "
            "192.0.2.53, 192.0.2.53:5353 or [2001:db8::53]:5353"
        ) from None


def plain(name: Any) -> str:
    """A name of DNS in lower case and without its last dot; case means nothing there (RFC 4343)."""
    return str(name).lower().rstrip(".")


def is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def names_of(here: Iterable[str]) -> set[str]:
    """Names and addresses as they are compared."""
    return {text if is_address(text) else plain(text) for text in here}


def judge(mail: Mail, host: str, fqdn: str, here: Iterable[str]) -> tuple[str, list[str]]:
    """What keeps the domain's mail from the host (or ""), and what else there is to say about it."""
    own = names_of(here)
    name = plain(fqdn)
    # A bare host name would be taken for one below the zone's own domain, or for a top-level domain.
    record = f'"{mail.domain}. IN MX 1 {name if "." in name else "zulip.example.com"}."'
    if "." not in name:
        record += " (with the full name of this host)"
    if why := fault(mail, own):
        text = (
            f"The MX record of {mail.domain} does not point at {host}: {why}. Create in your DNS {record}; or, where "
        )
        return text + "mail takes another way to this host, set email_gateway_mx_check: warn", []
    return "", remarks(mail, own, record)


def fault(mail: Mail, own: set[str]) -> str:
    """Why mail does not come to the host with these names and addresses; or ""."""
    if not mail.exchangers:
        if mail.records:
            return 'found "0 .", with which a domain says that it takes no mail at all (RFC 7505); remove it'
        return "found none" if mail.exists else f"found none, and no name {mail.domain} either"
    found = ", ".join(mail.records) or "none"
    ours = [one for one in mail.first if one.means(own)]
    if not ours:
        addresses = ", ".join(sorted(text for text in own if is_address(text)))
        names = ", ".join(sorted(text for text in own if not is_address(text)))
        text = f"found {found}, so mail goes to {' and '.join(map(str, mail.first))}"
        if any(one.means(own) for one in mail.exchangers):
            text += ", which has the lowest number and so is asked first"
        return f"{text}; this host is {names} ({addresses or 'no address'})"
    if without := [one.host for one in ours if not one.addresses]:
        return f"found {found}, and {without[0]} has no address, so that nobody can connect to it"
    return ""


def remarks(mail: Mail, own: set[str], record: str) -> list[str]:
    """What is worth knowing where mail does come to the host."""
    found = []
    if mail.canonical != mail.domain:
        found.append(f"{mail.domain} is an alias (CNAME) of {mail.canonical}, whose MX records count")
    if not mail.records:
        found.append(f"{mail.domain} has no MX record; mail comes as its own address is this host's. Better: {record}")
    for one in mail.first:
        if not one.means(own):
            found.append(f"{one} gets as much of the mail as this host, for its MX record has the same number")
        elif one.canonical != one.host:
            why = "which some senders refuse (RFC 2181, 10.3); name the host itself"
            found.append(f"the MX record names {one.host}, an alias (CNAME) of {one.canonical}, {why}")
    if later := [str(one) for one in mail.exchangers if one not in mail.first and not one.means(own)]:
        found.append(
            f"{' and '.join(later)} gets mail when this host does not answer, and has to bring it here later; if it "
            "is to bring more than one client may: postfix_localmail_client_exceptions"
        )
    return found


class ActionModule(ActionBase):
    """The plugin."""

    _requires_connection = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        super().run(tmp, task_vars)
        _, arguments = self.validate_argument_spec(
            {
                "domain": {"type": "str", "required": True},
                "fqdn": {"type": "str", "required": True},
                "here": {"type": "list", "elements": "str", "required": True},
                "servers": {"type": "list", "elements": "str", "default": []},
            }
        )
        host = str((task_vars or {}).get("inventory_hostname", ""))
        # Of Ansible's own kind of text, which dnspython does not take for one.
        here, servers = ([str(text) for text in arguments[name]] for name in ("here", "servers"))
        return check(str(arguments["domain"]), host, str(arguments["fqdn"]), here, servers)


def check(domain: str, host: str, fqdn: str, here: list[str], servers: list[str]) -> dict[str, Any]:
    """What the action returns."""
    result: dict[str, Any] = {"changed": False, "records": [], "fault": "", "remarks": [], "address": ""}
    try:
        names = Dns(servers)
        mail = names.mail(plain(domain))
    except Unfit as error:
        text = str(error)
        if text[0].islower():
            text = (
                f"Where mail for {domain} goes is not known: {text}. Look at the DNS of the machine that runs "
                "Ansible (/etc/resolv.conf), set email_gateway_dns_servers, or email_gateway_mx_check: skip"
            )
        return result | {"fault": text}
    fault, remarks = judge(mail, host, fqdn, here)
    own = names_of(here)
    sought = [one for one in mail.first if one.means(own)] or mail.first
    address = next((address for one in sought[:1] for address in one.addresses), "")
    if address and not fault:
        remarks += without_name(names, address, plain(fqdn))
    return result | {"records": mail.records, "fault": fault, "remarks": remarks, "address": address}


def without_name(names: Dns, address: str, fqdn: str) -> list[str]:
    """What there is to say if nobody finds a name for the address, from which bounces leave the host."""
    try:
        if names.names_back(address):
            return []
    except Unfit:
        return []
    what = (
        f"{address} has no name in DNS that leads back to it, and some servers take no mail (bounces) from such a host"
    )
    return [f"{what}; have its provider set its reverse name (PTR record) to {fqdn}"]
