"""The version: what the program says of itself, and who else names it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from email_gateway import __version__, cli

PROJECT = Path(__file__).parents[1]


def test_the_program_tells_its_version_without_a_configuration(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--config", "/nowhere/gateway.conf", "--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"zulip-email-gateway {__version__}\n"


def test_program_collection_and_changelog_name_the_same_version():
    collection = yaml.safe_load((PROJECT / "galaxy.yml").read_text())["version"]
    changelog = re.search(r"^## \[(\d[^]]*)\]", (PROJECT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert changelog, "CHANGELOG.md has no heading with a version, such as: ## [2.0.0] - 2026-01-31"
    assert (collection, changelog[1]) == (__version__, __version__)
