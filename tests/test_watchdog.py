"""What systemd is told."""

from __future__ import annotations

import socket

import pytest
from email_gateway import watchdog


@pytest.mark.parametrize("name", ["{folder}/notify", "@zulip-email-gateway-test"])
def test_how_long_the_next_step_takes(tmp_path, monkeypatch, name):
    address = name.format(folder=tmp_path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(address.replace("@", "\0", 1))
        systemd.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        monkeypatch.setenv("WATCHDOG_USEC", "600000000")
        watchdog.expect(1.5)
        assert systemd.recv(1000) == b"WATCHDOG_USEC=1500000\nWATCHDOG=1"


def test_nothing_without_systemd(monkeypatch):
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    watchdog.expect(1)
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere")
    monkeypatch.setenv("WATCHDOG_USEC", "1")
    watchdog.expect(1)
