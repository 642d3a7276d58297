#!/usr/bin/python
"""Ansible module: what stands on this host for mail: Postfix, another mail system, port 25. Reads, never writes."""

from __future__ import annotations

import ipaddress
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: postfix_info
short_description: What stands on this host for mail
description:
  - Looks at port 25, Postfix and its configuration, a mail system that it would replace, and Zulip's certificate.
  - Fails with the file that cannot be read, or the command that does not end. Changes nothing.
options:
  backup:
    description: The folder with the copy of what was there before the gateway.
    type: path
    required: true
  packages:
    description: Names of the Debian packages that are needed.
    type: list
    elements: str
    required: true
  networks:
    description: What has to be addresses, or networks in CIDR notation.
    type: list
    elements: str
    default: []
author: The Zulip email gateway maintainers
"""

EXAMPLES = r"""
- name: Look at Postfix
  postfix_info:
    backup: /var/backups/zulip-email-gateway
    packages: [postfix, ssl-cert]
  register: mail
"""

RETURN = r"""
port_25_holder:
  description: >-
    The program that listens on port 25, C(master) for Postfix; several with commas between them; C(unknown) if its name
    cannot be told; empty if there is none.
  type: str
  returned: success
other_mail_system:
  description: The installed packages that are a mail system other than Postfix, with commas between them; or empty.
  type: str
  returned: success
installed:
  description: Whether there is /usr/sbin/postfix.
  type: bool
  returned: success
missing_packages:
  description: Those of O(packages) that are not installed.
  type: list
  elements: str
  returned: success
configured:
  description: Whether there is /etc/postfix/main.cf.
  type: bool
  returned: success
ours:
  description: Whether the gateway has written it.
  type: bool
  returned: success
patterns:
  description: Each EMAIL_GATEWAY_PATTERN whose addresses our configuration takes mail for.
  type: list
  elements: str
  returned: success
relayhost:
  description: Through which host mail leaves this one, by a configuration that is not ours; empty for none.
  type: str
  returned: success
waiting:
  description: The number of mails in the queue of a mail system that is not ours, whether it runs or not.
  type: int
  returned: success
queue_fault:
  description: Why nobody can tell that number; or empty.
  type: str
  returned: success
has_backup:
  description: Whether O(backup) has a complete copy.
  type: bool
  returned: success
has_program:
  description: Whether there is /usr/local/bin/zulip-email-gateway.
  type: bool
  returned: success
zulips_certificate:
  description: Whether Zulip's certificate and its key are there.
  type: bool
  returned: success
certificate_fault:
  description: Why these two do not belong together; or empty, also without openssl.
  type: str
  returned: success
network_fault:
  description: What is wrong with the first of O(networks) that is none, as Python's ipaddress says it; or empty.
  type: str
  returned: success
has_senders:
  description: Whether rspamd checks senders here, or what came with it is still there.
  type: bool
  returned: success
address:
  description: An address of this host by which others may reach it; that of loopback if it has no other.
  type: str
  returned: success
version:
  description: Postfix's version; empty while it is not installed.
  type: str
  returned: success
database:
  description: Its kind of database for maps, such as C(hash); empty while it is not installed.
  type: str
  returned: success
alias_database:
  description: The file with /etc/aliases in that form.
  type: str
  returned: success
has_aliases:
  description: Whether there is /etc/aliases, and that file.
  type: bool
  returned: success
running:
  description: Whether Postfix runs, as it says itself.
  type: bool
  returned: success
enabled_and_active:
  description: Whether systemd has started it, and will at boot.
  type: bool
  returned: success
stale:
  description: Whether something in /etc/postfix, or /etc/mailname, has changed since the gateway last reloaded Postfix.
  type: bool
  returned: success
"""

# For tests a folder.
ROOT = Path("/")
# What is left of the checks of senders, the second in O(backup).
SENDERS = "etc/systemd/system/zulip-email-gateway-senders.service", "senders-packages"
# By this the gateway knows its own files.
MARK = "Zulip email gateway"
# How long a command may take (seconds).
PATIENCE = 60


class Unfit(Exception):
    """Something about this host that cannot be found out."""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """A command's status and what it printed; status 127, as in a shell, if there is none. Raises Unfit if it hangs."""
    try:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=PATIENCE,
            check=False,
            env={**os.environ, "LC_ALL": "C"},
        )
    except OSError as error:
        return subprocess.CompletedProcess(command, 127, "", str(error))
    except subprocess.TimeoutExpired:
        raise Unfit(
            f"{' '.join(command)} has not ended within {PATIENCE} seconds; "
            "see what it waits for on the host, then run this again"
        ) from None


def succeeds(*command: str) -> bool:
    return run(*command).returncode == 0


def text_of(path: Path) -> str:
    """The text of a file; empty if there is no such file, or something else in its place. Raises Unfit."""
    if not os.path.isfile(path):
        return ""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise Unfit(f"{path} cannot be read: {error.strerror}; mend it on the host, then run this again") from error


def is_program(path: Path) -> bool:
    return os.access(path, os.X_OK)


def port_25_holder() -> str:
    """See RETURN."""
    options = ("--no-header", "--listening", "--numeric", "--tcp", "--processes")
    listening = run("ss", *options, "sport = :25").stdout.strip()
    names = sorted(set(re.findall(r'\("([^"]*)"', listening)))
    # Postfix's master shares the port with its smtpd processes.
    if "master" in names:
        return "master"
    # Without CAP_SYS_PTRACE, in some containers, ss does not know the names of others' processes.
    if listening and not names:
        return next((name for name in ("exim4", "master") if succeeds("pgrep", "-x", name)), "unknown")
    return ",".join(names)


def installed_packages() -> dict[str, str]:
    """What is installed, and what each package provides."""
    listed = run("dpkg-query", "--show", r"--showformat=${db:Status-Status} ${Package} ${Provides}\n").stdout
    return dict(re.findall(r"^installed (\S+) (.*)$", listed, re.MULTILINE))


def patterns(main_cf: str) -> list[str]:
    """See RETURN; main_cf: its text, in a comment of which earlier versions of the gateway wrote them."""
    comments = re.findall(r"^# EMAIL_GATEWAY_PATTERN(?: =|, and former ones:) (.*)", main_cf, re.MULTILINE)
    if comments:
        return " ".join(comments).split()
    lines = [line.strip() for line in text_of(ROOT / "etc/postfix/zulip_patterns").split("\n")]
    return [line for line in lines if line and not line.startswith("#")]


def queue_of_postfix() -> tuple[int, str]:
    """How many mails wait there, and why nobody can tell: a queue that cannot be read is not an empty one."""
    try:
        asked = run("postqueue", "-j")
    except Unfit as error:  # which matters only where this mail system is replaced
        return 0, str(error)
    return len(re.findall(r"^\{", asked.stdout, re.MULTILINE)), failure("postqueue", asked)


def queue_of_exim() -> tuple[int, str]:
    """The same for Exim."""
    try:
        asked = run("exim4", "-bpc")
    except Unfit as error:
        return 0, str(error)
    number = asked.stdout.strip().rpartition("\n")[2]
    if re.fullmatch("[0-9]+", number):
        return int(number), failure("exim4 -bpc", asked)
    return 0, failure("exim4 -bpc", asked) or with_last_words("exim4 -bpc tells no number", asked)


def failure(name: str, done: subprocess.CompletedProcess[str]) -> str:
    """How a command has failed, in one line; or empty."""
    return with_last_words(f"{name} ended with {done.returncode}", done) if done.returncode else ""


def with_last_words(what: str, done: subprocess.CompletedProcess[str]) -> str:
    """Behind a text the end of what a command said, without JSON and fit for one line."""
    lines = [line for line in f"{done.stdout}\n{done.stderr}".split("\n") if line.strip() and not line.startswith("{")]
    return re.sub(r"[\x00-\x1f\x7f]", " ", f"{what}: {' '.join(lines[-3:])}").rstrip(": ")


def relayhost_of_exim() -> str:
    """The host by which Exim sends all mail, as Debian's configuration has it; or empty."""
    conf = text_of(ROOT / "etc/exim4/update-exim4.conf.conf")
    if not re.search("^dc_eximconfig_configtype='(smarthost|satellite)'", conf, re.MULTILINE):
        return ""
    found = re.search("^dc_smarthost='([^'\n]*)'", conf, re.MULTILINE)
    return found[1] if found else ""


def certificate_fault(key: Path, chain: Path) -> str:
    """See RETURN; both files exist."""
    # Without openssl nobody can tell yet.
    if shutil.which("openssl") is None:
        return ""
    of_key = run("openssl", "pkey", "-in", str(key), "-pubout", "-passin", "pass:")
    if of_key.returncode:
        return f"{key} has no key that can be read without a passphrase"
    of_chain = run("openssl", "x509", "-in", str(chain), "-noout", "-pubkey")
    if of_chain.returncode:
        return f"{chain} has no certificate"
    return "" if of_key.stdout == of_chain.stdout else f"{key} is not the key of {chain}"


def network_fault(networks: list[str]) -> str:
    """See RETURN."""
    try:
        for network in networks:
            ipaddress.ip_network(network)
    except ValueError as error:
        return str(error)
    return ""


def address() -> str:
    """See RETURN."""
    found = re.search(r"\binet6? ([0-9a-f.:]+)", run("ip", "address", "show", "scope", "global").stdout)
    return found[1] if found else "127.0.0.1"


def is_stale(reloaded: Path) -> bool:
    """See RETURN; reloaded: a file that is touched at each reload."""
    try:
        since = reloaded.stat().st_mtime_ns
        folder = ROOT / "etc/postfix"
        # The folder itself, too: something may have been removed from it. By the time of the last change of any kind:
        # a file that is moved there, or put back from a copy, keeps its older time of modification.
        paths = [ROOT / "etc/mailname", folder, *folder.rglob("*")]
        return any(path.lstat().st_ctime_ns > since for path in paths)
    except OSError:  # one of them does not exist
        return True


def postfix_info(backup: Path, packages: list[str], networks: list[str]) -> dict[str, Any]:
    """Everything the module returns; raises Unfit."""
    installed, has_exim = (is_program(ROOT / "usr/sbin" / name) for name in ("postfix", "exim4"))
    main_cf = ROOT / "etc/postfix/main.cf"
    text = text_of(main_cf)
    configured, ours = os.path.exists(main_cf), MARK in text
    foreign = configured and not ours
    waiting, queue_fault = 0, ""
    # Without main.cf there is no mail system to replace, and postqueue does not run.
    if installed and foreign:
        waiting, queue_fault = queue_of_postfix()
    elif has_exim:
        waiting, queue_fault = queue_of_exim()
    relayhost = ""
    if foreign:
        relayhost = run("postconf", "-h", "relayhost").stdout.strip()
    elif has_exim:
        relayhost = relayhost_of_exim()
    there = installed_packages()
    mail_systems = [name for name, provides in there.items() if "mail-transport-agent" in re.split("[ ,]+", provides)]
    key, chain = ROOT / "etc/ssl/private/zulip.key", ROOT / "etc/ssl/certs/zulip.combined-chain.crt"
    zulips_certificate = os.path.exists(key) and os.path.exists(chain)
    version, database = [*run("postconf", "-dh", "mail_version", "default_database_type").stdout.split(), "", ""][:2]
    # See DATABASE_README; hash is what Debian's Postfix has, should it not be installed yet.
    alias_database = f"etc/aliases.{ {'hash': 'db', 'btree': 'db', '': 'db'}.get(database, database) }"
    return {
        "port_25_holder": port_25_holder(),
        "other_mail_system": ",".join(name for name in mail_systems if name != "postfix"),
        "installed": installed,
        "missing_packages": [name for name in packages if name not in there],
        "configured": configured,
        "ours": ours,
        "patterns": patterns(text),
        "relayhost": relayhost,
        "waiting": waiting,
        "queue_fault": queue_fault,
        "has_backup": os.path.exists(backup / "complete"),
        "has_program": is_program(ROOT / "usr/local/bin/zulip-email-gateway"),
        "zulips_certificate": zulips_certificate,
        "certificate_fault": certificate_fault(key, chain) if zulips_certificate else "",
        "network_fault": network_fault(networks),
        "has_senders": os.path.exists(ROOT / SENDERS[0]) or os.path.exists(backup / SENDERS[1]),
        "address": address(),
        "version": version,
        "database": database,
        "alias_database": f"/{alias_database}",
        "has_aliases": os.path.exists(ROOT / "etc/aliases") and os.path.exists(ROOT / alias_database),
        # Debian 12's unit does not know that Postfix has died. Without main.cf the answer would take a second.
        "running": configured and succeeds("postfix", "status"),
        "enabled_and_active": all(
            succeeds("systemctl", "--quiet", verb, "postfix") for verb in ("is-active", "is-enabled")
        ),
        "stale": is_stale(backup / "reloaded"),
    }


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "backup": {"type": "path", "required": True},
            "packages": {"type": "list", "elements": "str", "required": True},
            "networks": {"type": "list", "elements": "str", "default": []},
        },
        supports_check_mode=True,
    )
    options = module.params
    try:
        facts = postfix_info(Path(options["backup"]), options["packages"], options["networks"])
    except Unfit as error:
        module.fail_json(msg=str(error))
    module.exit_json(changed=False, **facts)


if __name__ == "__main__":
    main()
