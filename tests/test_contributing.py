"""CONTRIBUTING.md names files, make targets and scenarios that there are."""

from __future__ import annotations

import re
from pathlib import Path

PROJECT = Path(__file__).parents[1]
TEXT = (PROJECT / "CONTRIBUTING.md").read_text()


def test_its_files_are_there():
    paths = re.findall(r"[\w*.-]+(?:/[\w*.-]+)+\.\w+", TEXT)
    paths += [f"files/email_gateway/email_gateway/{name}" for name in re.findall(r"`(\w+\.py)`", TEXT)]
    paths += [f"molecule/{scenario}/tests/{name}" for scenario, name in re.findall(r"SCENARIO=(\w+) TEST=(\S+)", TEXT)]
    assert len(paths) > 20
    assert [path for path in paths if not any(PROJECT.glob(path))] == []


def test_its_targets_and_scenarios_are_there():
    makefile = (PROJECT / "Makefile").read_text()
    targets = set(" ".join(re.findall(r"^([a-z -]+):", makefile, re.MULTILINE)).split())
    named = set(" ".join(re.findall(r"\bmake ([a-z-]+(?: [a-z-]+)*)", TEXT)).split())
    assert {"check", "converge", "role-readmes"} <= named <= targets
    scenarios = set(re.findall(r"SCENARIO=(\w+)", TEXT))
    assert scenarios <= {path.parent.name for path in PROJECT.glob("molecule/*/molecule.yml")}
