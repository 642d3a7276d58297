"""A server as it is by default: doctor, and the version. Faults are the scenario doctor's business."""

from __future__ import annotations

import yaml
from conftest import PROJECT, ZulipHost, changed


def test_everything_is_right(host):
    mx: ZulipHost = host("mx12")
    done = mx.play(playbook="doctor")
    assert changed(done) == 0 and "Everything is right." in done.stdout
    assert "WRONG" not in done.stdout and "warn" not in done.stdout


def test_the_version_is_told_to_every_user(host):
    version = yaml.safe_load((PROJECT / "galaxy.yml").read_text())["version"]
    told = host("mx12").sh("runuser -u nobody -- zulip-email-gateway --version")
    assert told == f"zulip-email-gateway {version}\n"
