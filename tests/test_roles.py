"""Roles: specs agree with defaults, everything documented."""

from __future__ import annotations

import re
from pathlib import Path

import jinja2
import pytest
import yaml
from email_gateway.journal import UNDELIVERABLE
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
    text = yaml.safe_load((PROJECT / "roles/email_gateway/vars/main.yml").read_text())["__email_gateway_class_in_line"]
    assert re.sub(jinja2.Environment().from_string(text).render(), "", line) == without


def test_a_hand_over_takes_as_long_on_both_sides(tmp_path):
    """The deadline of a delivery, and Postfix's, are made from it."""
    text = yaml.safe_load((PROJECT / "roles/email_gateway/vars/main.yml").read_text())["__email_gateway_hand_over"]
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
