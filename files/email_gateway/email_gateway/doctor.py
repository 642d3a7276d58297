"""Is everything right on this host? Looks, and changes nothing.

Each check says what it found in one line, and what to do where that is not right.
What can only be seen from outside (DNS, port 25 from elsewhere) is the business of
playbooks/doctor.yml.
"""

from __future__ import annotations

import configparser
import json
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from . import postfix, postfix_checks, status, worker_log
from .client import Client
from .config import Config
from .finding import OK, WARN, WRONG, Finding, found, run
from .quarantine import alarm
from .verdict import EX_OK, EX_TEMPFAIL, UNKNOWN_ADDRESS, Trouble, bug

ZULIP_CONF = Path("/etc/zulip/zulip.conf")
SETTINGS = Path("/etc/zulip/settings.py")
DEPLOYMENTS = Path("/home/zulip/deployments")
ZULIP_SECRETS = Path("/etc/zulip/zulip-secrets.conf")
UNITS = Path("/etc/systemd/system")
# A mail that has waited this long (seconds) needs somebody to look at it.
LONG = 3600.0
# When so many aliases could not be asked for, the others are not either.
MOST_WAITING = 3
_PATTERN = re.compile(r"EMAIL_GATEWAY_PATTERN *=")
# Zulip's files are shorter (bytes).
_LARGEST = 2**20
# Probes are sent every hour; this long without one (seconds) is too long.
PROBED = 3 * 3600.0
# An inbox is looked at every nine minutes; this long without it (seconds) is too long.
POLLED = 1800.0


def examine(config: Config) -> list[Finding]:
    """All findings, in the order of a mail's way."""
    checks: list[Callable[[Config], Iterator[Finding]]] = [
        _system,
        _upgrades,
        _units,
        _inbox,
        _zulip_conf,
        _pattern,
        _credential,
        _zulip,
        _worker,
        _aliases,
        _files,
        _journal,
    ]
    if postfix.is_ours():
        checks[:0] = postfix_checks.CHECKS
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
    release = platform.freedesktop_os_release()
    now = f"{release['ID'].capitalize()} {release.get('VERSION_ID', '')}"
    if config.system and now != config.system:
        what = f"the system was upgraded from {config.system} to {now} since playbooks/site.yml ran"
        yield Finding(WRONG, what, "run playbooks/site.yml")


def _upgrades(config: Config) -> Iterator[Finding]:
    """Whether one of Zulip or of packages was begun and not ended; and one of Zulip since site.yml ran."""
    current, coming = DEPLOYMENTS / "current", DEPLOYMENTS / "next"
    # Zulip's scripts leave it there, the same as the current one, once they have ended.
    if coming.exists() and coming.resolve() != current.resolve():
        what = f"an upgrade of Zulip was begun and has not ended, or was taken back ({coming} is not {current})"
        yield Finding(WARN, what, "run it again to its end, then playbooks/site.yml")
    if config.zulip_version:
        version = re.search(r"^ZULIP_VERSION = [\"'](.*)[\"']", _as_zulip(current / "version.py"), re.MULTILINE)
        if version and version[1] != config.zulip_version:
            what = f"Zulip was upgraded from {config.zulip_version} to {version[1]} since playbooks/site.yml ran"
            yield Finding(WARN, what, "run playbooks/site.yml")
    if unfinished := run("dpkg", "--audit").stdout.strip():
        what = f"dpkg has not finished with all packages: {unfinished.splitlines()[0]}"
        yield Finding(WARN, what, "run: dpkg --configure -a, then playbooks/site.yml")


def _units(_: Config) -> Iterator[Finding]:
    """Timers, services and path units of the gateway have to run."""
    for path in sorted(UNITS.glob("zulip-email-gateway*")):
        if not path.is_file() or "[Install]" not in path.read_text(encoding="utf-8"):
            continue  # an operator's own additions; or it is started by another one
        good = run("systemctl", "is-active", "--quiet", path.name).returncode == 0
        text = f"{path.name} {'runs' if good else 'does not run'}"
        yield found(good, text, f"look at: systemctl status {path.name}; run playbooks/site.yml")


def _inbox(config: Config) -> Iterator[Finding]:
    """Log in, as the gateway's own user: what root wrote the service could not read."""
    imap, folder = config.imap, config.state_dir
    if imap is None:
        return
    asked = {"imap": imap._replace(secret=imap.secrets())._asdict(), "state_dir": str(folder), "accept_existing": True}
    command = ("runuser", "-u", folder.owner(), "--", sys.argv[0], "poll", "--try")
    done = run(*command, input=json.dumps({**asked, "timeout": config.timeout}))
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
    yield found(good, text, "run playbooks/site.yml with email_gateway_takeover: true")


def _pattern(config: Config) -> Iterator[Finding]:
    """Whether Zulip gives out the addresses that the gateway takes."""
    if not SETTINGS.exists():
        return
    lines = enumerate(_as_zulip(SETTINGS).splitlines(), 1)
    given = [(number, line.partition("=")[2].strip()) for number, line in lines if _PATTERN.match(line)]
    ours = config.pattern.address("%s")
    if not given:
        yield Finding(WRONG, f"{SETTINGS} has no EMAIL_GATEWAY_PATTERN", "run playbooks/site.yml")
        return
    number, last = given[-1]
    good = last in (f'"{ours}"', f"'{ours}'")
    text = f"Zulip gives out addresses as {ours}"
    if not good:
        text = f"{SETTINGS}, line {number}, has EMAIL_GATEWAY_PATTERN = {last}, and the gateway {ours}"
    yield found(
        good, text, "take that line out (or set email_gateway_pattern, if it is meant), then run playbooks/site.yml"
    )


def _credential(config: Config) -> Iterator[Finding]:
    if not config.worker_counts:
        return
    good = _zulips(ZULIP_SECRETS).get("secrets", "shared_secret", fallback="") == config.secret()
    text = "the credential is Zulip's shared secret"
    if not good:
        text = f"{ZULIP_SECRETS} has another shared secret than the gateway"
    yield found(good, text, "run playbooks/site.yml")


def _zulip(config: Config) -> Iterator[Finding]:
    status, line, _ = Client(config.hand_over).ask("check")
    yield Finding(OK, line.partition(" ")[2]) if status == EX_OK else Finding(WRONG, line)


def _worker(_: Config) -> Iterator[Finding]:
    """Whether the process runs that posts what Zulip has accepted."""
    if ZULIP_CONF.exists():
        good = any(b"process_queue" in line and b"email_mirror" in line for line in _command_lines())
        text = f"Zulip's email_mirror worker {'runs' if good else 'does not run: mail is accepted, and waits'}"
        yield found(good, text, "run: supervisorctl start 'zulip-workers:*', or look at: supervisorctl status")


def _command_lines() -> Iterator[bytes]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended
            yield path.read_bytes()


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
        if path.exists() and run("runuser", "-u", owner, "--", "test", "-r", str(path)).returncode:
            what = f"the user {owner} cannot read {path}"
            yield Finding(WRONG, what, f"run playbooks/site.yml, or look at: getfacl {path.parent}")


def _journal(config: Config) -> Iterator[Finding]:
    """What status tells, and whether somebody has to look at it."""
    # By the program itself, which goes on as the gateway's user: what root writes that could not read.
    done = run(sys.argv[0], "status", "--json")
    if done.returncode:
        yield Finding(WRONG, done.stderr.strip().removeprefix("zulip-email-gateway: "))
        return
    facts = json.loads(done.stdout)
    yield from _outcomes(config, facts)
    yield from _probed(config, facts)
    yield from _polled(facts)
    if postfix.is_ours():
        queue = facts["queue"]
        if queue is None:
            yield Finding(WRONG, "Postfix's queue cannot be read", "look at: systemctl status postfix")
        else:
            good = not queue["mails"] or queue["oldest"] < LONG
            text = f"{queue['mails']} mails wait in Postfix's queue"
            if queue["mails"]:
                text += f", the oldest for {queue['oldest']:.0f} s: {'; '.join(sorted(queue['reasons']))}"
            yield found(good, text, "look at: zulip-email-gateway status; docs/troubleshooting.md has each reason")
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
    if facts["probe"] is None and facts["since"] > time.time() - PROBED:
        yield Finding(OK, "no probe was sent yet, for the gateway is new here")
    elif facts["probe"] is None or facts["probe"]["looked"] < time.time() - PROBED:
        what = f"no probe was sent for {PROBED / 3600:g} hours"
        yield Finding(WRONG, what, "look at: systemctl status zulip-email-gateway-probe.timer")
    elif facts["probe"]["seconds"] is None:
        what = "the last probe, a mail through port 25, was not posted in time"
        remedy = "look at: journalctl -u zulip-email-gateway-probe; then: systemctl start zulip-email-gateway-probe"
        yield Finding(WRONG, what, remedy)
    else:
        yield Finding(OK, f"the last probe was posted after {facts['probe']['seconds']:.1f} s")


def _polled(facts: dict[str, Any]) -> Iterator[Finding]:
    """When the inbox was last looked through to its end."""
    if not status.POLLER.exists():
        return
    last = facts["last_poll"]
    if last is None:
        yield Finding(WARN, "the inbox was not read yet", "look at: journalctl -u zulip-email-gateway-poll")
    else:
        at = time.strftime("%Y-%m-%d %H:%M", time.localtime(last))
        good = time.time() - last < POLLED
        yield found(good, f"the inbox was last read at {at}", "look at: journalctl -u zulip-email-gateway-poll")


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


def _as_zulip(path: Path) -> str:
    """A file of Zulip's, read as its user, who may have put anything there; raises Trouble."""
    done = run("runuser", "-u", "zulip", "--", "head", "-c", str(_LARGEST), "--", str(path), seconds=10)
    if done.returncode:
        raise Trouble("4.3.5", "configuration", f"the user zulip cannot read {path}: {done.stderr.strip()}")
    return done.stdout


def _zulips(path: Path) -> configparser.RawConfigParser:
    """The same, of sections with names and values."""
    text, parser = _as_zulip(path), configparser.RawConfigParser()
    try:
        parser.read_string(text)
    except configparser.Error as error:  # its text quotes lines, which may be secret
        what = f"{path} cannot be parsed ({type(error).__name__})"
        raise Trouble("4.3.5", "configuration", f"{what}; run playbooks/site.yml, which names the line") from error
    return parser
