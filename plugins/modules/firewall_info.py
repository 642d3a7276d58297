#!/usr/bin/python
"""Ansible module: whether the host's firewalls let strangers connect to port 25. Reads, never writes."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: firewall_info
short_description: Whether the host's firewalls let strangers connect to port 25
description:
  - Looks at ufw, firewalld, and where neither is active at the rules of nftables and iptables. Changes nothing.
options:
  comment:
    description: The comment of the gateway's own rule in ufw.
    type: str
    required: true
author: The Zulip email gateway maintainers
"""

EXAMPLES = r"""
- name: See whether port 25 is open
  firewall_info:
    comment: Zulip email gateway
  register: firewall
"""

RETURN = r"""
ufw:
  description: >-
    C(open) to everybody, C(ours) (by the gateway's own rule, which stands also while ufw is not active), C(closed),
    C(narrowed) (there are rules for port 25, and they do not let everybody in), or empty if ufw is not active.
  type: str
  returned: always
firewalld:
  description: The same for the zone of the interface that receives mail; never C(ours).
  type: str
  returned: always
zone:
  description: That zone.
  type: str
  returned: always
rules:
  description: The rules for port 25 that narrow it.
  type: list
  elements: str
  returned: always
closed_by:
  description: The chain of nftables or iptables that rejects strangers at port 25, and how; empty if none surely does.
  type: str
  returned: always
redirected:
  description: Where a rule takes what comes to port 25, as ADDRESS:PORT (a container's published port); or empty.
  type: str
  returned: always
"""

PORT = 25
UFW = Path("/etc/ufw")
# Tables that iptables keeps in nftables; iptables-save reads them better.
OF_IPTABLES = ("filter", "nat", "mangle", "raw", "security")


def run(*command: str) -> str | None:
    """What a command printed; None if there is no such command, or it failed."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=20,
            check=False,
            env={**os.environ, "LC_ALL": "C", "LANGUAGE": ""},  # ufw speaks other languages, too
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def text_of(path: Path) -> str:
    """A file's text, empty if there is none."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def interface() -> str:
    """The interface through which the host is reached from elsewhere; empty if it has no default route."""
    for family in ("-4", "-6"):
        if found := re.search(r"^default .*\bdev (\S+)", run("ip", family, "route") or "", re.MULTILINE):
            return found[1]
    return ""


def has_port(ports: str) -> bool:
    """Whether a list such as 22,25 or 20:30 or 20-30 has port 25."""
    for part in ports.split(","):
        low, _, high = re.sub("[:-]", " ", part).partition(" ")
        if low.isdigit() and int(low) <= PORT <= int(high if high.isdigit() else low):
            return True
    return False


class Ufw(NamedTuple):
    """What ufw says of port 25."""

    state: str
    rules: list[str]


def ufw(comment: str) -> Ufw:
    """See RETURN. ufw itself takes a tenth of a second for each answer, so only what its files do not tell is asked."""
    if "comment=" in text_of(UFW / "user.rules") and f"'{comment}'" in "".join(
        line for line in (run("ufw", "show", "added") or "").splitlines(keepends=True) if re.search(r"\b25/tcp\b", line)
    ):
        return Ufw("ours", [])
    is_enabled = re.search("(?im)^ENABLED=[\"']?yes", text_of(UFW / "ufw.conf"))
    status = (run("ufw", "status", "verbose") if is_enabled else "") or ""
    if not status.startswith("Status: active"):
        return Ufw("", [])
    narrow: list[str] = []
    for line in status.splitlines():
        rule = re.match(r"(.+?) {2,}(ALLOW|DENY|REJECT|LIMIT)(?: IN)? {2,}(.+?)(?: +#.*)?$", line.strip())
        if rule is None or not of_ufw(rule[1]):
            continue
        everybody = rule[3].startswith("Anywhere") and " on " not in rule[1]
        if everybody and rule[2] == "ALLOW":
            return Ufw("narrowed", narrow) if any("ALLOW" not in one for one in narrow) else Ufw("open", [])
        if not rule[1].startswith("Anywhere"):
            narrow.append(" ".join(rule[0].split()))
        if everybody and rule[1].startswith("Anywhere"):
            break
    if narrow:
        return Ufw("narrowed", narrow)
    return Ufw("open" if "allow (incoming)" in status else "closed", [])


def of_ufw(to: str) -> bool:
    """Whether a rule's first column is about port 25: 25, 25/tcp, 20:30/tcp, Anywhere, or an application with it."""
    to = re.sub(r" on \S+| \(v6\)", "", to).strip()
    if to == "Anywhere":
        return True
    if ports := re.fullmatch(r"(?:\S+ )?([\d,:]+)(?:/tcp)?", to):
        return has_port(ports[1])
    if re.search(r"/udp$", to):
        return False
    return any(
        has_port(ports) for ports in re.findall(r"^ +([\d,:]+)(?:/tcp)?$", run("ufw", "app", "info", to) or "", re.M)
    )


class Firewalld(NamedTuple):
    """What firewalld says of port 25."""

    state: str
    zone: str
    rules: list[str]


def firewalld(device: str) -> Firewalld:
    """See RETURN."""
    if run("systemctl", "--quiet", "is-active", "firewalld") is None:
        return Firewalld("", "", [])
    zone = (run("firewall-cmd", f"--get-zone-of-interface={device}") or "").strip() if device else ""
    zone = zone or (run("firewall-cmd", "--get-default-zone") or "").strip()
    here = f"--zone={zone}"
    if run("firewall-cmd", here, "--quiet", "--query-service=smtp") is not None:
        return Firewalld("open", zone, [])
    ports = (run("firewall-cmd", here, "--list-ports") or "").split()
    if any(port.endswith("/tcp") and has_port(port.removesuffix("/tcp")) for port in ports):
        return Firewalld("open", zone, [])
    if (run("firewall-cmd", "--permanent", here, "--get-target") or "").strip() == "ACCEPT":
        return Firewalld("open", zone, [])
    rules = (run("firewall-cmd", here, "--list-rich-rules") or "").splitlines()
    rules = [rule for rule in rules if re.search(r'service name="smtp"|port port="25"', rule)]
    # Zones for certain senders come before that of the interface (firewalld.zone(5)).
    for line in (run("firewall-cmd", "--get-active-zones") or "").splitlines():
        name = line.split()[0] if line[:1].strip() else zone
        if name != zone and run("firewall-cmd", f"--zone={name}", "--quiet", "--query-service=smtp") is not None:
            sources = (run("firewall-cmd", f"--zone={name}", "--list-sources") or "").strip()
            if sources:
                rules.append(f"zone {name} (sources {sources}) has the service smtp")
    return Firewalld("narrowed" if rules else "closed", zone, rules)


# --- nftables and iptables, as a first packet from a stranger passes them. A rule whose condition is not
# understood counts as one that may let it pass: only what surely closes the port is reported.
# (Yes, no) as True and False; None is "who knows".


class Rule(NamedTuple):
    """A rule: whether it matches, and what it does: accept, drop, return, "jump CHAIN", "goto CHAIN", or nothing."""

    matches: bool | None
    does: str


def verdict(chains: dict[str, list[Rule]], name: str, depth: int = 0) -> str:
    """What a chain does with the packet: accept, drop, maybe (accept), or return for its end."""
    may_pass = False
    for rule in chains.get(name, []) if depth < 16 else []:
        if rule.matches is False:
            continue
        does = rule.does
        if does.startswith(("jump ", "goto ")):
            inner = verdict(chains, does[5:], depth + 1)
            does = inner if does.startswith("goto ") or inner != "return" else ""
        if rule.matches is None or does == "maybe":
            may_pass = may_pass or does in ("accept", "maybe", "return")
        elif does in ("accept", "drop", "return"):
            return "maybe" if may_pass and does != "accept" else does
    return "maybe" if may_pass else "return"


def iptables_rule(words: list[str], device: str) -> Rule:
    """A rule of iptables-save, without its chain."""
    known: list[bool | None] = []
    does, negated = "", False
    rest = list(words)
    while rest:
        option = rest.pop(0)
        if option == "!":
            negated = True
            continue
        values = []
        while rest and not rest[0].startswith("-") and rest[0] != "!":
            values.append(rest.pop(0))
        value = values[0] if values else ""
        if option in ("-j", "-g"):
            plain = {"ACCEPT": "accept", "DROP": "drop", "REJECT": "drop", "RETURN": "return"}
            does = plain.get(value, f"{'jump' if option == '-j' else 'goto'} {value}")
        elif not does and option not in ("-m", "--comment"):
            known.append(iptables_match(option, values, negated, device))
        negated = False
    return Rule(all_of(known), does)


def iptables_match(option: str, values: list[str], negated: bool, device: str) -> bool | None:
    """Whether a condition holds; of one that is not known nobody knows."""
    if option == "--tcp-flags":
        return negated is not (values == ["FIN,SYN,RST,ACK", "SYN"]) if values[-1:] == ["SYN"] else None
    value = values[0] if len(values) == 1 else ""
    found: bool | None = None
    if option == "-p":
        found = value in ("tcp", "all")
    elif option in ("--dport", "--dports"):
        found = has_port(value)
    elif option == "-i":
        found = value in (device, "+") or (value.endswith("+") and device.startswith(value[:-1]))
    elif option == "-s":
        found = value in ("0.0.0.0/0", "::/0")
    elif option in ("--ctstate", "--state"):
        found = "NEW" in value.split(",")
    elif option == "--syn":
        found = True
    return found if found is None else found is not negated


def all_of(known: list[bool | None]) -> bool | None:
    if False in known:
        return False
    return None if None in known else True


def iptables(device: str) -> Iterator[tuple[str, str]]:
    """What the chain INPUT does, and where port 25 is redirected to: ("closed" or "redirected", text)."""
    chains: dict[str, list[Rule]] = {}
    table = policy = ""
    for line in (run("iptables-save") or "").splitlines():
        if line.startswith("*"):
            table, chains, policy = line[1:], {}, ""
        elif line.startswith(":INPUT "):
            policy = line.split()[1]
        elif line.startswith("-A "):
            chain, *words = shlex.split(line)[1:]
            rule = iptables_rule(words, device)
            chains.setdefault(chain, []).append(rule)
            to = re.search(r"-j DNAT .*--to-destination (\S+)", line)
            if table == "nat" and to and rule.matches and chain != "OUTPUT" and "--dport" in line:
                yield "redirected", to[1]
        elif line == "COMMIT" and table == "filter":
            if (done := verdict(chains, "INPUT")) == "drop":
                yield "closed", "iptables, chain INPUT: a rule rejects it"
            elif done == "return" and policy == "DROP":
                yield "closed", "iptables, chain INPUT: its policy is DROP, and no rule accepts it"


def nftables(device: str) -> Iterator[tuple[str, str]]:
    """The same for the chains of nftables at the hook input."""
    try:
        listed = json.loads(run("nft", "--json", "list", "ruleset") or "{}").get("nftables", [])
    except ValueError:
        return
    chains: dict[tuple[str, str], dict[str, list[Rule]]] = {}
    hooks, outgoing = [], set()
    for entry in listed:
        kind, item = next(iter(entry.items()))
        table = (str(item.get("family")), str(item.get("table")))
        if table[0] not in ("inet", "ip") or (table[0] == "ip" and table[1] in OF_IPTABLES and run("iptables-save")):
            continue
        if kind == "chain" and item.get("hook") == "output":
            outgoing.add((*table, item["name"]))
        if kind == "chain" and item.get("hook") == "input" and item.get("type") == "filter":
            hooks.append((table, item["name"], item.get("policy", "accept")))
        elif kind == "rule":
            rule = nft_rule(item["expr"], device)
            chains.setdefault(table, {}).setdefault(item["chain"], []).append(rule)
            to = next((each["dnat"] for each in item["expr"] if "dnat" in each), None)
            if (
                to
                and rule.matches
                and '"dport"' in json.dumps(item["expr"])
                and (*table, item["chain"]) not in outgoing
            ):
                yield "redirected", f"{to.get('addr')}:{to.get('port', PORT)}"
    for table, chain, policy in hooks:
        done = verdict(chains.get(table, {}), chain)
        where = f"nftables, table {' '.join(table)}, chain {chain}"
        if done == "drop":
            yield "closed", f"{where}: a rule rejects it"
        elif done == "return" and policy == "drop":
            yield "closed", f"{where}: its policy is drop, and no rule accepts it"


def nft_rule(statements: list[dict[str, Any]], device: str) -> Rule:
    """A rule as libnftables-json(5) has it."""
    known: list[bool | None] = []
    for statement in statements:
        kind, item = next(iter(statement.items()))
        if kind == "match":
            known.append(nft_match(item, device))
        elif kind in ("accept", "drop", "return"):
            return Rule(all_of(known), kind)
        elif kind == "reject":
            return Rule(all_of(known), "drop")
        elif kind in ("jump", "goto"):
            return Rule(all_of(known), f"{kind} {item['target']}")
        elif kind == "vmap":
            return nft_map(item, known, device)
        elif kind not in ("counter", "log", "dnat"):
            known.append(None)
    return Rule(all_of(known), "")


def nft_value(left: Any, device: str) -> Any:
    """What the packet has where a rule looks; None if that is not known."""
    if "meta" in left:
        return {"l4proto": "tcp", "iifname": device, "iif": device, "nfproto": "ipv4", "protocol": "ip"}.get(
            left["meta"]["key"]
        )
    if "ct" in left:
        return "new" if left["ct"].get("key") == "state" else None
    payload = left.get("payload", {})
    if payload.get("protocol") in ("udp", "icmp", "icmpv6", "ip6"):
        return ""
    return {("tcp", "dport"): PORT, ("th", "dport"): PORT, ("ip", "protocol"): "tcp", ("ip", "saddr"): ""}.get(
        (payload.get("protocol"), payload.get("field"))
    )


def nft_match(item: dict[str, Any], device: str) -> bool | None:
    left = item["left"]
    value = nft_value(left, device) if isinstance(left, dict) else None
    found = None if value is None else nft_has(item["right"], value)
    if found is None or item.get("op") not in ("==", "in", "!="):
        return None
    # Of a packet of another protocol there is nothing to compare.
    if value == "" and "saddr" not in json.dumps(left):
        return False
    return not found if item["op"] == "!=" else found


def nft_has(right: Any, value: Any) -> bool | None:
    """Whether a value, a list, a set or a range has it."""
    if isinstance(right, dict):
        if "set" in right:
            return nft_has(right["set"], value)
        if "range" in right and isinstance(value, int):
            low, high = right["range"]
            return bool(low <= value <= high)
        return False if value == "" else None
    if isinstance(right, list):
        each = [nft_has(one, value) for one in right]
        return True if True in each else None if None in each else False
    if isinstance(right, str) and right.startswith("@") and value != "":
        return None
    return bool(right == value)


def nft_map(item: dict[str, Any], known: list[bool | None], device: str) -> Rule:
    """A verdict map: ct state vmap { established : accept, invalid : drop }."""
    value = nft_value(item["key"], device) if isinstance(item["key"], dict) else None
    data = item.get("data")
    if value is None or not isinstance(data, dict):
        return Rule(None, "accept")
    for key, does in data.get("set", []):
        if nft_has(key, value):
            kind, target = next(iter(does.items()))
            return Rule(all_of(known), f"{kind} {target['target']}" if target else kind)
    return Rule(False, "")


def main() -> None:
    module = AnsibleModule(argument_spec={"comment": {"type": "str", "required": True}}, supports_check_mode=True)
    device = interface()
    by_ufw, by_firewalld = ufw(module.params["comment"]), firewalld(device)
    plain = [*iptables(device), *nftables(device)]
    closed = (
        []
        if by_ufw.state not in ("", "ours") or by_firewalld.state
        else [text for kind, text in plain if kind == "closed"]
    )
    module.exit_json(
        changed=False,
        ufw=by_ufw.state,
        firewalld=by_firewalld.state,
        zone=by_firewalld.zone,
        rules=by_ufw.rules + by_firewalld.rules,
        closed_by="; ".join(closed),
        redirected=next((text for kind, text in plain if kind == "redirected"), ""),
    )


if __name__ == "__main__":
    main()
