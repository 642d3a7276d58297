"""Is everything right on this host? Looks, and changes nothing.

Each check says what it found in one line, and what to do where that is not right.
What can only be seen from outside (DNS, port 25 from elsewhere) is the business of
playbooks/doctor.yml.
"""

from __future__ import annotations

import configparser
import hashlib
import json
import platform
import re
import smtplib
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from . import sender_checks, worker_log
from .client import Client
from .config import Config
from .quarantine import alarm
from .verdict import COPY_AGAIN, EX_OK, EX_TEMPFAIL, UNKNOWN_ADDRESS, Trouble, bug

ZULIP_CONF = Path("/etc/zulip/zulip.conf")
ZULIP_SECRETS = Path("/etc/zulip/zulip-secrets.conf")
MAIN_CF = Path("/etc/postfix/main.cf")
ROOTS_MAIL = Path("/var/mail/root")
UNITS = Path("/etc/systemd/system")
# Where rspamd checks senders.
SENDERS = "/run/zulip-email-gateway-senders/"
# A mail that has waited this long (seconds) needs somebody to look at it.
LONG = 3600.0
# When so many aliases could not be asked for, the others are not either.
MOST_WAITING = 3
# Zulip's files are shorter (bytes).
_LARGEST = 2**20
# A certificate is renewed well before this time (seconds).
SOON = 7 * 86400
# Probes are sent every hour; this long without one (seconds) is too long.
PROBED = 3 * 3600.0


OK, WARN, WRONG = "ok", "warn", "WRONG"


class Finding(NamedTuple):
    """One line of the report. level: OK, WARN or WRONG; remedy: the command or the variable that mends it."""

    level: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.level:<6} {self.text}" + (f"; {self.remedy}" if self.remedy else "")


def examine(config: Config) -> list[Finding]:
    """All findings, in the order of a mail's way."""
    checks: list[Callable[[Config], Iterator[Finding]]] = [
        _system,
        _units,
        _inbox,
        _zulip_conf,
        _credential,
        _zulip,
        _aliases,
        _files,
        _journal,
    ]
    if _is_ours(MAIN_CF):
        checks[0:0] = [_postfix, _port_25, _postmaster, _certificate]
    findings: list[Finding] = []
    for check in checks:
        try:
            findings += check(config)
        except Trouble as trouble:
            findings.append(Finding(WRONG, str(trouble)))
        except Exception as error:  # the other checks tell more
            findings.append(Finding(WRONG, bug(error).reason))
    return findings


def _system(config: Config) -> Iterator[Finding]:
    """What site.yml has set up depends on the system's release."""
    found = platform.freedesktop_os_release()
    now = f"{found['ID'].capitalize()} {found.get('VERSION_ID', '')}"
    if config.system and now != config.system:
        what = f"the system was upgraded from {config.system} to {now} since playbooks/site.yml ran"
        yield Finding(WRONG, what, "run playbooks/site.yml")


def _postfix(config: Config) -> Iterator[Finding]:
    done = _run("postfix", "check")
    # That the host has no IPv6 is all right.
    complaints = [line for line in done.stderr.strip().splitlines() if "disabling IPv6" not in line]
    if done.returncode or complaints:
        what = complaints[0] if complaints else f"exit status {done.returncode}"
        yield Finding(WRONG, f"postfix check: {what}", "run playbooks/site.yml")
    elif _run("postfix", "status").returncode:
        yield Finding(WRONG, "Postfix does not run", "look at: systemctl status postfix, journalctl -u 'postfix*'")
    elif (config.sender_checks != sender_checks.OFF) != (SENDERS in _run("postconf", "-h", "smtpd_milters").stdout):
        what = f"gateway.conf has sender_checks = {config.sender_checks}, and Postfix is configured otherwise"
        yield Finding(WRONG, what, "run playbooks/site.yml")
    else:
        yield Finding(OK, "Postfix runs, and its configuration is sound")


def _port_25(config: Config) -> Iterator[Finding]:
    """A dialogue up to RCPT, as a sender would have it; no mail."""
    domain = config.pattern.domain
    try:
        with socket.create_connection(("127.0.0.1", 25), 10) as connection, connection.makefile("rwb") as lines:
            banner = lines.readline().decode("ascii", "replace").strip()
            answers = []
            recipient = config.pattern.address("0" * 32)
            for command in ("EHLO doctor.invalid", "MAIL FROM:<>", f"RCPT TO:<{recipient}>"):
                lines.write(f"{command}\r\n".encode())
                lines.flush()
                while (line := lines.readline())[3:4] == b"-":
                    pass
                answers.append(line.decode("ascii", "replace").strip())
            lines.write(b"QUIT\r\n")
    except OSError as error:
        yield Finding(WRONG, f"port 25 does not answer: {error}", "look at: journalctl -u 'postfix*'")
        return
    good = banner.startswith(f"220 {domain} ")
    yield _found(good, f"port 25 greets with {banner!r}", "run playbooks/site.yml")
    # No channel has that address, so that Zulip, if it is asked, says so; Postfix's own map has other words.
    is_accepted = answers[-1].startswith("250")
    good = COPY_AGAIN in answers[-1] if config.asks else is_accepted
    remedy = "run playbooks/site.yml"
    if is_accepted:
        remedy = (
            "Zulip could not be asked whether it has that address; if nothing else is wrong here, look at: "
            "systemctl status zulip-email-gateway-policy.socket"
        )
    yield _found(good, f"port 25 answers {answers[-1]!r} to an address that no channel has", remedy)


def _certificate(_: Config) -> Iterator[Finding]:
    """With a STARTTLS as a sender would do it: whether the key fits, and the latest is in use."""
    chain = re.search(r"^smtpd_tls_chain_files *=\s*(\S+)\s+(\S+)", MAIN_CF.read_text(encoding="utf-8"), re.MULTILINE)
    path = chain[2] if chain else ""
    end = _run("openssl", "x509", "-enddate", "-noout", "-in", path)
    if end.returncode:
        yield Finding(WRONG, f"the certificate {path} cannot be read", "run playbooks/site.yml")
        return
    good = _run("openssl", "x509", "-checkend", str(SOON), "-noout", "-in", path).returncode == 0
    until = end.stdout.strip().partition("=")[2]
    yield _found(good, f"the certificate {path} is good until {until}", "renew it")
    ours = _run("openssl", "x509", "-fingerprint", "-sha256", "-noout", "-in", path).stdout
    try:
        shown = hashlib.sha256(_certificate_shown()).hexdigest()
    except (OSError, smtplib.SMTPException) as error:
        key = chain[1] if chain else ""
        what = f"STARTTLS at port 25 fails ({error}): is {key} the key of {path}? Senders fall back to plain text"
        yield Finding(WRONG, what, "put both in place again, and look at: journalctl -u 'postfix*'")
        return
    good = shown == ours.partition("=")[2].strip().replace(":", "").lower()
    text = "STARTTLS at port 25 works, with that certificate"
    if not good:
        text = f"STARTTLS at port 25 works with another certificate than {path}"
    remedy = "look at: systemctl status zulip-email-gateway-certificate.timer, or run: systemctl reload postfix"
    yield _found(good, text, remedy)


def _certificate_shown() -> bytes:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with smtplib.SMTP("127.0.0.1", 25, "doctor.invalid", timeout=10) as server:
        server.starttls(context=context)
        assert isinstance(server.sock, ssl.SSLSocket)
        return server.sock.getpeercert(binary_form=True) or b""


def _postmaster(config: Config) -> Iterator[Finding]:
    """Whether mail to postmaster is taken, and whether there is room for it (RFC 5321, 4.5.1)."""
    postmaster = f"postmaster@{config.pattern.domain}"
    try:
        with smtplib.SMTP("127.0.0.1", 25, "doctor.invalid", timeout=10) as server:
            server.ehlo()
            server.mail("")
            code, answer = server.rcpt(postmaster)
    except (OSError, smtplib.SMTPException) as error:
        yield Finding(WRONG, f"port 25 does not answer: {error}", "look at: journalctl -u 'postfix*'")
        return
    if code == 250:
        yield Finding(OK, f"port 25 takes mail to {postmaster}")
    else:
        said = answer.decode("ascii", "replace")
        yield Finding(WRONG, f"port 25 refuses mail to {postmaster}: {code} {said}", "see docs/troubleshooting.md")
    if not ROOTS_MAIL.exists():
        return
    size = ROOTS_MAIL.stat().st_size
    most = int(_run("postconf", "-h", "mailbox_size_limit").stdout.strip() or 0)
    if most and size > most / 2:
        what = f"{ROOTS_MAIL}, where mail to {postmaster} goes, has {size >> 20} of at most {most >> 20} MiB"
        remedy = "read and empty it, or send root's mail elsewhere (/etc/aliases, then newaliases)"
        yield Finding(WRONG, what, remedy)


def _units(_: Config) -> Iterator[Finding]:
    """Timers, services and path units of the gateway have to run."""
    for path in sorted(UNITS.glob("zulip-email-gateway*")):
        if not path.is_file() or "[Install]" not in path.read_text(encoding="utf-8"):
            continue  # an operator's own additions; or it is started by another one
        good = _run("systemctl", "is-active", "--quiet", path.name).returncode == 0
        text = f"{path.name} {'runs' if good else 'does not run'}"
        yield _found(good, text, f"look at: systemctl status {path.name}; run playbooks/site.yml")


def _inbox(config: Config) -> Iterator[Finding]:
    """Log in, as the gateway's own user: what root wrote the service could not read."""
    imap, folder = config.imap, config.state_dir
    if imap is None:
        return
    asked = {"imap": imap._replace(secret=imap.secrets())._asdict(), "state_dir": str(folder), "accept_existing": True}
    command = ("runuser", "-u", folder.owner(), "--", sys.argv[0], "poll", "--try")
    done = _run(*command, input=json.dumps({**asked, "timeout": config.timeout}))
    good = done.returncode == 0
    yield Finding(OK if good else WRONG, (done.stdout if good else done.stderr).strip())


def _zulip_conf(config: Config) -> Iterator[Finding]:
    if not ZULIP_CONF.exists() or config.imap is not None:
        return
    classes = _zulips(ZULIP_CONF).get("machine", "puppet_classes", fallback="")
    good = not re.search(r"zulip::(postfix_localmail|local_mailserver)\b", classes)
    text = "Zulip's Puppet leaves the mail system alone"
    if not good:
        text = f"{ZULIP_CONF} lists {classes}: Zulip's next upgrade takes the mail system over"
    yield _found(good, text, "run playbooks/site.yml with email_gateway_takeover: true")


def _credential(config: Config) -> Iterator[Finding]:
    if not config.worker_counts:
        return
    good = _zulips(ZULIP_SECRETS).get("secrets", "shared_secret", fallback="") == config.secret()
    text = "the credential is Zulip's shared secret"
    if not good:
        text = f"{ZULIP_SECRETS} has another shared secret than the gateway"
    yield _found(good, text, "run playbooks/site.yml")


def _zulip(config: Config) -> Iterator[Finding]:
    status, line, _ = Client(config.hand_over).ask("check")
    yield Finding(OK, line.partition(" ")[2]) if status == EX_OK else Finding(WRONG, line)


def _aliases(config: Config) -> Iterator[Finding]:
    """Where each leads, and whether Zulip still knows that. Asking costs a place within Zulip's limits."""
    client, waits = Client(config.hand_over), 0
    for name, target in sorted(config.addresses.aliases.items()):
        address = config.pattern.address(name)
        status, line, cause = client.ask("knows", recipient=address) if waits < MOST_WAITING else (EX_TEMPFAIL, "", "")
        if status == EX_OK:
            yield Finding(OK, f"mail for {address} goes to {target.channel}")
        elif cause == UNKNOWN_ADDRESS:
            yield Finding(WRONG, f"mail for {address} waits: {line.partition(' ')[2]}")
        elif status == EX_TEMPFAIL:  # what is wrong besides, _zulip says
            waits += 1
            yield Finding(OK, f"mail for {address} goes to {target.channel}; Zulip could not be asked for it now")
        else:
            yield Finding(WRONG, f"mail for {address} is refused: {line.partition(' ')[2]}")


def _files(config: Config) -> Iterator[Finding]:
    """What the gateway's user has to be able to write and read."""
    folder, owner = config.state_dir, config.state_dir.owner()
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # replaced just now
            if path.lstat().st_uid != folder.stat().st_uid:
                yield Finding(WRONG, f"{path} is not {owner}'s: all mail waits", f"run: chown -R {owner}: {folder}")
                break
    logs = (config.logs / name for name in (*worker_log.NAMES, worker_log.ERRORS))
    for path in (*logs, config.queue_errors):
        if path.exists() and _run("runuser", "-u", owner, "--", "test", "-r", str(path)).returncode:
            what = f"the user {owner} cannot read {path}"
            yield Finding(WRONG, what, f"run playbooks/site.yml, or look at: namei -l {path}")


def _journal(config: Config) -> Iterator[Finding]:
    """What status tells, and whether somebody has to look at it."""
    # By the program itself, which goes on as the gateway's user: what root writes that could not read.
    done = _run(sys.argv[0], "status", "--json")
    if done.returncode:
        yield Finding(WRONG, done.stderr.strip().removeprefix("zulip-email-gateway: "))
        return
    facts = json.loads(done.stdout)
    yield from _outcomes(config, facts)
    yield from _probed(config, facts)
    if _is_ours(MAIN_CF):
        queue = facts["queue"]
        if queue is None:
            yield Finding(WRONG, "Postfix's queue cannot be read", "look at: systemctl status postfix")
        else:
            good = not queue["mails"] or queue["oldest"] < LONG
            text = f"{queue['mails']} mails wait in Postfix's queue"
            if queue["mails"]:
                text += f", the oldest for {queue['oldest']:.0f} s: {'; '.join(sorted(queue['reasons']))}"
            yield Finding(OK if good else WRONG, text)
    for name in facts["damaged"]:
        what = f"{config.state_dir / name}: the journal was damaged and began anew"
        yield Finding(WRONG, what, "look for the reason in: journalctl -k; then remove that file")
    delivered = ", ".join(f"{number} {cause}" for cause, number in facts["counts"].get("delivered", {}).items())
    since = time.strftime("%Y-%m-%d %H:%M", time.localtime(facts["since"]))
    yield Finding(OK, f"mails since {since}: {delivered or 'none delivered'}; {facts['quarantine']} in quarantine")


def _probed(config: Config, facts: dict[str, Any]) -> Iterator[Finding]:
    """Whether the last mail that was sent to see whether mail works was posted, and whether it was sent."""
    if not config.addresses.probe:
        return
    if facts["probe"] is None or facts["probe"]["at"] < time.time() - PROBED:
        what = f"no probe was sent for {PROBED / 3600:g} hours"
        yield Finding(WRONG, what, "look at: systemctl status zulip-email-gateway-probe.timer")
    elif facts["probe"]["seconds"] is None:
        what = "the last probe, a mail through port 25, was not posted"
        yield Finding(WRONG, what, "look at: journalctl -u zulip-email-gateway-probe")
    else:
        yield Finding(OK, f"the last probe was posted after {facts['probe']['seconds']:.1f} s")


def _outcomes(config: Config, facts: dict[str, Any]) -> Iterator[Finding]:
    """Whether Zulip posts what it accepts."""
    if facts["worker_log"] is None and ZULIP_CONF.exists():
        what = f"no log of Zulip's email_mirror worker can be read in {config.logs}"
        yield Finding(WRONG, f"{what}: whether mail was posted is not known", "run playbooks/site.yml")
    elif facts["worker_log"] is None:
        yield Finding(OK, "Zulip runs elsewhere: that it has accepted a mail is all that is known here")
    if facts["server_restarts"]:
        what = "Zulip's mail server was restarted because it answered nothing but 500, as after a restart of PostgreSQL"
        yield Finding(OK, f"{what}: {facts['server_restarts']} times")
    if facts["lost"]:
        what = f"{facts['lost']} mails that Zulip accepted and did not post are in quarantine"
        yield Finding(WRONG, what, "look at: zulip-email-gateway quarantine list, then replay ID")
    if facts["next_to_go"]:
        yield Finding(WRONG, alarm(facts["lost_bytes"], config.quarantine_bytes, facts["next_to_go"]))
    if facts["waiting"]:
        what = f"{facts['waiting']} mails are with Zulip, whose email_mirror worker has not taken them yet"
        yield Finding(WRONG, what, "look at: supervisorctl status")


def _is_ours(path: Path) -> bool:
    return path.exists() and "Zulip email gateway" in path.read_text(encoding="utf-8", errors="replace")


def _zulips(path: Path) -> configparser.RawConfigParser:
    """A file of Zulip's, read as its user, who may have put anything there; raises Trouble."""
    done = _run("runuser", "-u", "zulip", "--", "head", "-c", str(_LARGEST), "--", str(path), seconds=10)
    if done.returncode:
        raise Trouble("4.3.5", "configuration", f"the user zulip cannot read {path}: {done.stderr.strip()}")
    found = configparser.RawConfigParser()
    try:
        found.read_string(done.stdout)
    except configparser.Error as error:  # its text quotes lines, which may be secret
        what = f"{path} cannot be parsed ({type(error).__name__})"
        raise Trouble("4.3.5", "configuration", f"{what}; run playbooks/site.yml, which names the line") from error
    return found


def _found(good: bool, text: str, remedy: str) -> Finding:
    return Finding(OK, text) if good else Finding(WRONG, text, remedy)


def _run(*command: str, input: str | None = None, seconds: float = 60) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, input=input, capture_output=True, text=True, errors="replace", timeout=seconds, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 127, "", str(error))
