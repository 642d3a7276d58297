"""On and off, and interrupted anywhere: it ends where it should."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import testhosts
from conftest import PROJECT, ZulipHost, changed, tell
from life import FOLLOW_UP, OFF, ON, changed_tasks, off, on, same, tree


@pytest.fixture
def mx(host) -> ZulipHost:
    return host("mxa")


def test_on_off_on_off_ends_where_it_began(mx, subject):
    """With ufw active: port 25 is opened and closed again."""
    mx.sh("ufw allow 22/tcp; ufw --force enable")
    before = tree(mx)
    foretold = changed_tasks(on(mx, "--check", "--diff"))
    same(before, tree(mx))
    done = changed_tasks(on(mx))
    assert done - FOLLOW_UP <= foretold <= done
    mx.send(mx.address(), subject=subject)
    mx.wait_for(subject)
    assert re.search(r"^25/tcp +ALLOW .*# Zulip email gateway", mx.sh("ufw status"), re.MULTILINE)

    installed = tree(mx)
    foretold = changed_tasks(off(mx, "--check", "--diff"))
    same(installed, tree(mx))
    done = changed_tasks(off(mx))
    assert done - FOLLOW_UP <= foretold <= done
    same(before, tree(mx))
    assert mx.pattern() == "" and mx.host.run("id zulip-email-gateway").rc != 0
    assert mx.sh("dpkg-query -W -f '${db:Status-Status}' postfix 2>/dev/null || true") in ("", "not-installed")
    assert not mx.host.socket("tcp://0.0.0.0:25").is_listening
    assert changed(off(mx)) == 0
    doctor = mx.play(playbook="doctor", zulip_puppet_classes=OFF)
    assert changed(doctor) == 0 and "the gateway is switched off, and not installed" in doctor.stdout

    assert changed(on(mx)) > 0
    assert changed(on(mx, "--tags", "postfix")) == 0
    assert changed(off(mx)) > 0
    same(before, tree(mx))
    assert "25/tcp" not in mx.sh("ufw status")
    mx.sh("ufw disable")


def interrupted(mx: ZulipHost, classes: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Runs that are killed after every third task that changes something, until one
    gets through; how many were killed."""
    monkeypatch.setenv("ANSIBLE_CALLBACK_PLUGINS", str(PROJECT / "molecule/lifecycle/callback"))
    monkeypatch.setenv("ANSIBLE_CALLBACKS_ENABLED", "interrupt")
    monkeypatch.setenv("INTERRUPT_AFTER", "3")
    for kills in range(15):
        done = mx.play(zulip_puppet_classes=classes)
        # Zulip can read its settings, and Postfix runs with all of a configuration or not at all.
        mx.python("compile(open('/etc/zulip/settings.py').read(), 's', 'exec')")
        mx.sh("if systemctl --quiet is-active postfix; then postfix check && postconf -n > /dev/null; fi")
        if done.returncode != -9:
            assert done.returncode == 0, done.stdout[-3000:]
            monkeypatch.undo()
            return kills
    pytest.fail("no run gets further than the one before")


def test_interrupted_anywhere_the_next_run_heals(mx, subject, monkeypatch):
    before = tree(mx)
    kills = interrupted(mx, ON, monkeypatch)
    assert kills >= 3
    assert changed(on(mx)) == 0
    mx.send(mx.address(), subject=subject)
    mx.wait_for(subject)
    back = interrupted(mx, OFF, monkeypatch)
    assert back >= 1
    tell(f"interrupted {kills} times on the way in, {back} times on the way back")
    same(before, tree(mx))


def test_nothing_of_the_test_hosts_is_known_to_the_bundle():
    for folder in ("roles", "files", "playbooks"):
        for path in (PROJECT / folder).rglob("*"):
            if path.is_file() and path.suffix != ".pyc":
                assert (
                    "standin" not in Path(path).read_text() and testhosts.SHARED.name + "/zulip" not in path.read_text()
                )
