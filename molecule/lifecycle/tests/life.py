"""What the tests of this scenario share: switch on, switch off, compare what is there."""

from __future__ import annotations

import re
import subprocess

from conftest import ZulipHost

OFF = "zulip::profile::standalone"
ON = "zulip::profile::standalone, zulip::postfix_localmail"

# What a check cannot foretell: what is done because something else was changed.
FOLLOW_UP = {
    "postfix_localmail : drain | Take no more mail, and deliver what waits",
    "postfix_localmail : service | Start Postfix, now and at boot, or reload its configuration",
}

# Everything an operator could miss: paths, types, owners, modes and contents. Left
# out: what dpkg, apt, systemd, the stand-in for Zulip and running programs write for
# themselves.
TREE = r"""
find /etc /usr/local /var/backups /var/lib /var/spool /home -xdev \
  \( -path /var/lib/dpkg -o -path /var/lib/apt -o -path /var/lib/systemd -o -path /var/lib/zulip-standin \
     -o -path /var/lib/ucf -o -path /var/lib/pam -o -path /etc/ssl/certs -o -path /var/lib/private \
     -o -path '/var/spool/postfix/*' -o -path '/var/lib/postfix/*' -o -path '/var/lib/zulip-email-gateway/*' \
     -o -path '/var/backups/apt.*' -o -path '/var/backups/dpkg.*' -o -path '/var/backups/alternatives.*' \
     -o -path /etc/resolv.conf -o -path /etc/hosts -o -path /var/lib/exim4 -o -path /var/spool/exim4 \) -prune -o \
  ! -name '*-' ! -name ld.so.cache ! -name '*.pyc' ! -name __pycache__ \
  -printf '%p %y %u:%g %m %l\n' -type f -exec md5sum {} +
"""


def tree(mx: ZulipHost) -> set[str]:
    return set(mx.sh(TREE).splitlines())


def on(mx: ZulipHost, *arguments: str, **variables: object) -> subprocess.CompletedProcess[str]:
    return mx.play(*arguments, zulip_puppet_classes=ON, **variables)


def off(mx: ZulipHost, *arguments: str, **variables: object) -> subprocess.CompletedProcess[str]:
    return mx.play(*arguments, zulip_puppet_classes=OFF, **variables)


def same(before: set[str], after: set[str]) -> None:
    gone, new = sorted(before - after), sorted(after - before)
    assert not gone and not new, "\n".join([*(f"- {line}" for line in gone), *(f"+ {line}" for line in new)])


def changed_tasks(done: subprocess.CompletedProcess[str]) -> set[str]:
    assert done.returncode == 0, done.stdout[-3000:]
    tasks = re.findall(r"^TASK \[(.*?)\] \*+\n(.*?)(?=^TASK|^PLAY RECAP|\Z)", done.stdout, re.MULTILINE | re.DOTALL)
    return {name for name, text in tasks if re.search(r"^(.\[[\d;]*m)?changed: ", text, re.MULTILINE)}
