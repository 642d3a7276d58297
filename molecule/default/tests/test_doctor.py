"""doctor on a server as it is by default. What it says where something is wrong is the scenario doctor's business."""

from __future__ import annotations

from conftest import ZulipHost, changed


def test_everything_is_right(host):
    mx: ZulipHost = host("mx12")
    done = mx.play(playbook="doctor")
    assert changed(done) == 0 and "Everything is right." in done.stdout
    assert "WRONG" not in done.stdout and "warn" not in done.stdout
