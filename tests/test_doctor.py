"""How doctor tells what it has found; what it finds is the scenarios' business."""

from __future__ import annotations

import json

import pytest
from email_gateway import cli, config, doctor
from email_gateway.finding import OK, WARN, WRONG, Finding

FOUND = [
    Finding(OK, "Postfix runs"),
    Finding(WARN, "the certificate is good for 9 days", "renew it"),
    Finding(WRONG, f"mail for general.{'a' * 32}@x waits", "run playbooks/site.yml"),
]


@pytest.fixture
def told(monkeypatch, capsys):
    """What the command prints of findings, and its exit status."""
    monkeypatch.setattr(config, "load", lambda _: None)
    monkeypatch.setattr(cli.os, "geteuid", lambda: 0)

    def tell(findings, *options):
        monkeypatch.setattr(doctor, "examine", lambda _: findings)
        status = cli.main(["doctor", *options])
        return capsys.readouterr().out, status

    return tell


def test_a_line_each_with_what_mends_it(told):
    shown, status = told(FOUND)
    assert shown == (
        "ok     Postfix runs\n"
        "warn   the certificate is good for 9 days; renew it\n"
        "WRONG  mail for general.aaaa...@x waits; run playbooks/site.yml\n"
    )
    assert status == 1
    assert told(FOUND[:2])[1] == 0


def test_for_programs(told):
    shown, status = told(FOUND, "--json")
    assert status == 1 and "a" * 32 not in shown
    assert json.loads(shown)[1] == {"level": "warn", "text": FOUND[1].text, "remedy": "renew it"}


def test_coloured_on_a_terminal_only(told, monkeypatch):
    assert "\x1b" not in told(FOUND)[0]
    monkeypatch.setattr(cli.sys.stdout, "isatty", lambda: True, raising=False)
    shown, _ = told(FOUND)
    assert [line[:8] for line in shown.splitlines()] == ["\x1b[32mok\x1b", "\x1b[33mwar", "\x1b[31;1mW"]
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in told(FOUND)[0]
