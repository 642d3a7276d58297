"""The first run, by the oldest ansible-core that is supported, on a server that makes it hard."""

from __future__ import annotations

import json
import re

import cores
import pytest
from conftest import PROJECT, ZulipHost, changed
from controllers import checkout, playbook

SITE = str(PROJECT / "playbooks/site.yml")
DEPLOY = ("-e", json.dumps({"ansible_user": "deploy", "ansible_become_password": "s3cret of deploy"}))

# Nobody logs in as root; sudo asks for a password; nothing is executed from where anybody may write; a
# repository of somebody else's is gone; unattended-upgrades is at work for a while.
HARD = """set -e
useradd --create-home --shell /bin/sh deploy
echo 'deploy:s3cret of deploy' | chpasswd
usermod --append --groups sudo deploy
cp -r /root/.ssh /home/deploy/ && chown -R deploy: /home/deploy/.ssh
echo 'PermitRootLogin no' > /etc/ssh/sshd_config.d/no-root.conf
for folder in /tmp /var/tmp; do mount -t tmpfs -o noexec,mode=1777 none $folder; done
for folder in /root /home/deploy; do mount --bind $folder $folder && mount -o remount,bind,noexec $folder; done
echo 'deb file:/nowhere ./' > /etc/apt/sources.list.d/gone.list
systemd-run --unit upgrades python3 -c "
import fcntl, time
locks = ('lib/dpkg/lock-frontend', 'lib/dpkg/lock', 'lib/apt/lists/lock', 'cache/debconf/config.dat')
files = [open('/var/' + path, 'a') for path in locks]
[fcntl.lockf(file, fcntl.LOCK_EX) for file in files]
time.sleep(45)"
sleep 1
"""


@pytest.fixture
def mx(host) -> ZulipHost:
    return host("mx41")


def test_classes_that_are_a_list_are_refused(mx, tmp_path):
    """By an ansible-core whose Jinja looks up all names of a template before it begins."""
    classes = ("-e", json.dumps({"zulip_puppet_classes": ["zulip::postfix_localmail"]}))
    for version in ("2.17", "2.18"):
        done = playbook(mx.fqdn, *classes, commands=cores.older(version), folder=tmp_path, site=SITE)
        assert done.returncode != 0 and "which is no string. Write the classes as in zulip.conf" in done.stdout, (
            done.stdout
        )


def test_from_a_world_writable_checkout(mx, tmp_path, subject):
    """There Ansible ignores ansible.cfg, as on WSL."""
    mx.sh(HARD)
    folder = checkout(tmp_path / "checkout")
    folder.chmod(0o777)
    done = playbook(mx.fqdn, *DEPLOY, commands=cores.older("2.17"), folder=folder)
    assert "world writable directory" in done.stderr, done.stderr
    assert changed(done) > 0
    assert mx.host.run("cp /bin/true /tmp/ && /tmp/true").rc == 126
    assert "s3cret" not in done.stdout + done.stderr
    mx.send(mx.address(), subject=subject)
    mx.wait_for(subject)


def test_again_from_another_folder_and_by_another_version(mx, tmp_path):
    """Nothing is left to do, and doctor agrees."""
    playbooks = checkout(tmp_path / "elsewhere") / "playbooks"
    site, doctor = (str(playbooks / f"{name}.yml") for name in ("site", "doctor"))
    done = playbook(mx.fqdn, *DEPLOY, commands=cores.older("2.18"), folder=tmp_path, site=site)
    assert changed(done) == 0, re.findall(r"TASK \[(.*)\].*\n(changed: .*)", done.stdout)
    done = playbook(mx.fqdn, *DEPLOY, commands=cores.older("2.17"), folder=tmp_path, site=doctor)
    assert done.returncode == 0 and "Everything is right" in done.stdout, done.stdout[-3000:]
