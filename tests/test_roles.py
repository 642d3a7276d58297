"""Roles: specs agree with defaults, everything documented."""

from __future__ import annotations

import re
from pathlib import Path

import jinja2
import pytest
import tomllib
import yaml
from email_gateway.journal import UNDELIVERABLE
from role_files import variables
from test_config import make_config

PROJECT = Path(__file__).parents[1]
ROLES = ["email_gateway", "postfix_localmail"]


def spec(role: str) -> dict[str, dict[str, object]]:
    entries = yaml.safe_load((PROJECT / f"roles/{role}/meta/argument_specs.yml").read_text())["argument_specs"]
    assert entries["preflight"] == entries["main"]
    return dict(entries["main"]["options"])


@pytest.mark.parametrize("role", ROLES)
def test_specs_agree_with_defaults(role):
    defaults = yaml.safe_load((PROJECT / f"roles/{role}/defaults/main.yml").read_text())
    assert defaults == {name: option["default"] for name, option in spec(role).items() if "default" in option}


@pytest.mark.parametrize("role", ROLES)
def test_every_variable_is_documented(role):
    text = (PROJECT / "docs/variables.md").read_text()
    assert [name for name in spec(role) if f"`{name}`" not in text] == []


def test_the_program_is_checked_for_the_oldest_and_the_newest_python():
    """Of the systems that are supported; make check asks mypy for both."""
    systems = variables("email_gateway")["__email_gateway_systems"]
    pythons = sorted(tuple(map(int, system["python"].split("."))) for system in systems.values())
    settings = tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]
    assert settings["mypy"]["python_version"] == ".".join(map(str, pythons[0]))
    assert settings["ruff"]["target-version"] == "py" + "".join(map(str, pythons[0]))
    assert f"mypy --python-version {'.'.join(map(str, pythons[-1]))}\n" in (PROJECT / "Makefile").read_text()
    text = " ".join((PROJECT / "README.md").read_text().split())
    assert all(name.split()[1] in text for name in systems)


@pytest.mark.parametrize(
    ("line", "without"),
    [
        ("puppet_classes = a, zulip::postfix_localmail", "puppet_classes = a"),
        ("puppet_classes=zulip::postfix_localmail,b", "puppet_classes=b"),
        ("  puppet_classes: a,zulip::local_mailserver , b", "  puppet_classes: a , b"),
        ("puppet_classes = a, zulip::postfix_localmailer", "puppet_classes = a, zulip::postfix_localmailer"),
    ],
)
def test_the_class_is_taken_out_of_the_line(line, without):
    text = variables("email_gateway")["__email_gateway_class_in_line"]
    assert re.sub(jinja2.Environment().from_string(text).render(), "", line) == without


def test_a_hand_over_takes_as_long_on_both_sides(tmp_path):
    """The deadline of a delivery, and Postfix's, are made from it."""
    text = variables("email_gateway")["__email_gateway_hand_over"]
    config = make_config(tmp_path)
    asked = {"email_gateway_timeout": config.timeout}
    assert float(jinja2.Environment().from_string(text).render(asked)) == config.hand_over


def test_bounces_that_cannot_be_delivered_come_where_they_are_counted():
    maps = PROJECT / "roles/postfix_localmail/templates/etc/postfix"
    assert f"2bounce_notice_recipient = {UNDELIVERABLE}" in (maps / "main.cf.j2").read_text()
    transports = re.findall(r"^/(.*gateway.*)/ +zulip-reply:$", (maps / "zulip_transport.j2").read_text(), re.MULTILINE)
    assert len(transports) == 1 and re.search(transports[0], UNDELIVERABLE)


def test_the_example_inventory_sets_what_there_is():
    """Also what it has in comments, to be switched on."""
    text = (PROJECT / "inventory/example/group_vars/zulip.yml").read_text()
    names = set(yaml.safe_load(text)) | set(re.findall(r"^# ([a-z_]+): ", text, re.MULTILINE))
    assert names <= spec("email_gateway").keys()
    assert {"zulip_puppet_classes", "email_gateway_mailname", "email_gateway_login"} <= names
    (host,) = yaml.safe_load((PROJECT / "inventory/example/hosts.yml").read_text())["zulip"]["hosts"]
    assert host == "zulip.example.com"


UNITS = sorted(PROJECT.glob("roles/*/templates/etc/systemd/system/*.j2"))


@pytest.mark.parametrize(
    "unit", [path for path in UNITS if path.name.endswith(".service.j2")], ids=lambda path: path.name
)
def test_every_service_starts_at_boot_or_by_another_unit(unit):
    others = "".join(path.read_text() for path in UNITS if path != unit)
    stem, name = unit.name.removesuffix(".service.j2"), unit.name.removesuffix(".j2")
    is_started = any((unit.parent / f"{stem}{kind}.j2").exists() for kind in (".timer", ".socket", ".path"))
    assert "\n[Install]\n" in unit.read_text() or is_started or f"Unit={name}" in others
