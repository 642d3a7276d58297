"""Is everything right on this host? Looks, and changes nothing.

Each check says what it found in one line, and what to do where that is not right.
What can only be seen from outside (DNS, port 25 from elsewhere) is the business of
playbooks/doctor.yml.
"""

from __future__ import annotations

import configparser
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from . import status
from .backend import prove
from .delivery import Gateway
from .verdict import Delivered, Trouble

ZULIP_CONF = Path("/etc/zulip/zulip.conf")
ZULIP_SECRETS = Path("/etc/zulip/zulip-secrets.conf")
MAIN_CF = Path("/etc/postfix/main.cf")
UNITS = Path("/etc/systemd/system")
# A mail that has waited this long (seconds) needs somebody to look at it.
LONG = 3600.0
# A certificate is renewed well before this time (seconds).
SOON = 7 * 86400


class Finding(NamedTuple):
    """One line of the report."""

    good: bool
    text: str


def examine(gateway: Gateway) -> list[Finding]:
    """All findings, in the order of a mail's way."""
    checks: list[Callable[[Gateway], Iterator[Finding]]] = [_units, _inbox, _zulip_conf, _credential, _zulip, _books]
    if _is_ours(MAIN_CF):
        checks[0:0] = [_postfix, _port_25, _certificate]
    findings: list[Finding] = []
    for check in checks:
        try:
            findings += check(gateway)
        except Trouble as trouble:
            findings.append(Finding(False, str(trouble)))
    return findings


def _postfix(_: Gateway) -> Iterator[Finding]:
    done = _run("postfix", "check")
    # That the host has no IPv6 is all right.
    complaints = [line for line in done.stderr.strip().splitlines() if "disabling IPv6" not in line]
    if done.returncode or complaints:
        what = complaints[0] if complaints else f"exit status {done.returncode}"
        yield Finding(False, f"postfix check: {what}; run playbooks/site.yml")
    elif _run("postfix", "status").returncode:
        yield Finding(False, "Postfix does not run; look at: systemctl status postfix, journalctl -u 'postfix*'")
    else:
        yield Finding(True, "Postfix runs, and its configuration is sound")


def _port_25(gateway: Gateway) -> Iterator[Finding]:
    """A dialogue up to RCPT, as a sender would have it; no mail."""
    domain = gateway.config.pattern.domain
    try:
        with socket.create_connection(("127.0.0.1", 25), 10) as connection, connection.makefile("rwb") as lines:
            banner = lines.readline().decode("ascii", "replace").strip()
            answers = []
            recipient = gateway.config.pattern.address("0" * 32)
            for command in ("EHLO doctor.invalid", "MAIL FROM:<>", f"RCPT TO:<{recipient}>"):
                lines.write(f"{command}\r\n".encode())
                lines.flush()
                while (line := lines.readline())[3:4] == b"-":
                    pass
                answers.append(line.decode("ascii", "replace").strip())
            lines.write(b"QUIT\r\n")
    except OSError as error:
        yield Finding(False, f"port 25 does not answer: {error}; look at: journalctl -u 'postfix*'")
        return
    good = banner.startswith(f"220 {domain} ")
    yield Finding(good, f"port 25 greets with {banner!r}" + _unless(good, "run playbooks/site.yml"))
    good = answers[-1].startswith("250")
    yield Finding(
        good, f"port 25 answers {answers[-1]!r} to a channel's address" + _unless(good, "run playbooks/site.yml")
    )


def _certificate(_: Gateway) -> Iterator[Finding]:
    chain = re.search(r"^smtpd_tls_chain_files *=\s*(\S+)\s+(\S+)", MAIN_CF.read_text(encoding="utf-8"), re.MULTILINE)
    path = chain[2] if chain else ""
    end = _run("openssl", "x509", "-enddate", "-noout", "-in", path)
    if end.returncode:
        yield Finding(False, f"the certificate {path} can not be read; run playbooks/site.yml")
        return
    good = _run("openssl", "x509", "-checkend", str(SOON), "-noout", "-in", path).returncode == 0
    until = end.stdout.strip().partition("=")[2]
    yield Finding(good, f"the certificate {path} is good until {until}" + _unless(good, "renew it"))


def _units(_: Gateway) -> Iterator[Finding]:
    """Timers, services and path units of the gateway have to run."""
    for path in sorted(UNITS.glob("zulip-email-gateway-*")):
        if "[Install]" not in path.read_text(encoding="utf-8"):
            continue  # started by another one
        good = _run("systemctl", "is-active", "--quiet", path.name).returncode == 0
        text = f"{path.name} {'runs' if good else 'does not run'}"
        yield Finding(good, text + _unless(good, f"look at: systemctl status {path.name}; run playbooks/site.yml"))


def _inbox(gateway: Gateway) -> Iterator[Finding]:
    """Log in, as the gateway's own user: what root wrote the service could not read."""
    imap, folder = gateway.config.imap, gateway.config.state_dir
    if imap is None:
        return
    asked = {"imap": imap._replace(secret=imap.secrets())._asdict(), "state_dir": str(folder)}
    command = ("runuser", "-u", folder.owner(), "--", sys.argv[0], "poll", "--try")
    done = _run(*command, input=json.dumps({**asked, "timeout": gateway.config.timeout}))
    good = done.returncode == 0
    yield Finding(good, (done.stdout if good else done.stderr).strip())


def _zulip_conf(gateway: Gateway) -> Iterator[Finding]:
    if not ZULIP_CONF.exists() or gateway.config.imap is not None:
        return
    conf = configparser.RawConfigParser()
    conf.read(ZULIP_CONF)
    classes = conf.get("machine", "puppet_classes", fallback="")
    good = not re.search(r"zulip::(postfix_localmail|local_mailserver)\b", classes)
    text = "Zulip's Puppet leaves the mail system alone"
    if not good:
        text = f"{ZULIP_CONF} lists {classes}: Zulip's next upgrade takes the mail system over"
    yield Finding(good, text + _unless(good, "run playbooks/site.yml with email_gateway_takeover: true"))


def _credential(gateway: Gateway) -> Iterator[Finding]:
    if not gateway.config.worker_counts:
        return
    secrets = configparser.RawConfigParser()
    secrets.read(ZULIP_SECRETS)
    good = secrets.get("secrets", "shared_secret", fallback="") == gateway.config.secret()
    text = "the credential is Zulip's shared secret"
    if not good:
        text = f"{ZULIP_SECRETS} has another shared secret than the gateway"
    yield Finding(good, text + _unless(good, "run playbooks/site.yml"))


def _zulip(gateway: Gateway) -> Iterator[Finding]:
    verdict = prove(gateway.backend(), gateway.config)
    good = isinstance(verdict, Delivered)
    yield Finding(good, verdict.note if isinstance(verdict, Delivered) else verdict.reason)


def _books(gateway: Gateway) -> Iterator[Finding]:
    """What status tells, and whether somebody has to look at it."""
    facts = status.collect(gateway)
    folder, owner = gateway.config.state_dir, gateway.config.state_dir.owner()
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # replaced just now
            if path.stat().st_uid != folder.stat().st_uid:
                yield Finding(False, f"{path} is not {owner}'s: all mail waits; run: chown -R {owner}: {folder}")
                break
    for path in (gateway.config.queue_stats, gateway.config.queue_errors):
        if path.exists() and _run("runuser", "-u", owner, "--", "test", "-r", str(path)).returncode:
            yield Finding(
                False, f"the user {owner} can not read {path}; run playbooks/site.yml, or look at: namei -l {path}"
            )
    if not facts["worker_statistics"]:
        what = f"{gateway.config.queue_stats} is missing or makes no sense"
        yield Finding(False, f"{what}: mail goes slower, in stretched windows; look at: supervisorctl status")
    if _is_ours(MAIN_CF):
        queue = facts["queue"]
        if queue is None:
            yield Finding(False, "Postfix' queue can not be read; run this as root")
        else:
            good = not queue["mails"] or queue["oldest"] < LONG
            text = f"{queue['mails']} mails wait in Postfix' queue"
            if queue["mails"]:
                text += f", the oldest for {queue['oldest']:.0f} s: {'; '.join(sorted(queue['reasons']))}"
            yield Finding(good, text)
    if facts["lost"]:
        what = f"{facts['lost']} mails that Zulip accepted and failed twice to post are in quarantine"
        yield Finding(False, f"{what}; look at: zulip-email-gateway quarantine list, then replay ID")
    delivered = sum(facts["counts"].get("delivered", {}).values())
    since = time.strftime("%Y-%m-%d %H:%M", time.localtime(facts["since"]))
    yield Finding(True, f"{delivered} mails delivered since {since}, {facts['quarantine']} in quarantine")


def _is_ours(path: Path) -> bool:
    return path.exists() and "Zulip email gateway" in path.read_text(encoding="utf-8", errors="replace")


def _unless(good: bool, remedy: str) -> str:
    return "" if good else f"; {remedy}"


def _run(*command: str, input: str | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, input=input, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 127, "", str(error))
