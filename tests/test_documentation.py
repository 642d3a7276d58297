"""What the documentation names is there, and the commands in it are run by a test."""

from __future__ import annotations

import re
from pathlib import Path

import email_gateway
import pytest

PROJECT = Path(__file__).parents[1]
PAGES = sorted(
    [PROJECT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
    + [*PROJECT.glob("docs/*.md"), *PROJECT.glob("roles/*/README.md")]
)
TEXTS = {str(page.relative_to(PROJECT)): page.read_text() for page in PAGES}
MAKEFILE = (PROJECT / "Makefile").read_text()
# Where programs are; .venv and .cache have thousands of others.
MODULES = {
    path.name for top in ("bench", "files", "molecule", "plugins", "tests") for path in PROJECT.glob(f"{top}/**/*.py")
}
SCENARIOS = {path.parent.name for path in PROJECT.glob("molecule/*/molecule.yml")}
# All that runs commands: scenarios, unit tests, and what make test itself does.
TESTS = "\n".join(
    path.read_text()
    for pattern in (
        "molecule/*/tests/*.py",
        "molecule/*.py",
        "molecule/shared/*.py",
        "tests/*.py",
        "tests/run",
        ".ci/run",
    )
    for path in sorted(PROJECT.glob(pattern))
    if path != Path(__file__)
)
# Where nobody waits for it: bench takes eight minutes, and clean would end the run.
BY_HAND = {"bench", "clean"}


@pytest.mark.parametrize("page", [page for page in TEXTS if page.startswith("docs/")])
def test_a_page_begins_with_the_question_that_it_answers(page):
    first = TEXTS[page].split("\n\n")[1]
    assert "?" in first, f"{page} begins with {first!r}. Write the question that it answers below its heading"


@pytest.mark.parametrize("page", TEXTS)
def test_its_files_are_there(page):
    """Links, and paths in `...`; a module's name alone is one of the program's, or of the plugins'."""
    folder = (PROJECT / page).parent
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]) if "://" not in link]
    assert [link for link in links if link and not (folder / link).exists()] == []
    tops = {path.name for path in PROJECT.iterdir() if path.is_dir()}
    named = [path for path in re.findall(r"`([\w.*-]+/[\w./*{}<>,-]*)`", TEXTS[page]) if path.split("/")[0] in tops]
    named = [re.sub(r"<\w+>", "*", path) for path in named if "production" not in path and "{" not in path]
    assert [path for path in named if not any(PROJECT.glob(path.rstrip("/")))] == []
    modules = [name for name in re.findall(r"`(\w+\.py)`", TEXTS[page]) if name not in ("settings.py", "version.py")]
    assert [name for name in modules if name not in MODULES] == []


@pytest.mark.parametrize("page", TEXTS)
def test_its_make_targets_are_run_by_make_test(page):
    named = set(" ".join(re.findall(r"^ *`?(?:sudo )?make ([a-z-]+(?: [a-z-]+)*)", code(page), re.MULTILINE)).split())
    targets = set(" ".join(re.findall(r"^([a-z -]+):", MAKEFILE, re.MULTILINE)).split())
    assert named <= targets
    run = set(re.findall(r"[a-z-]+", (PROJECT / "tests/run").read_text())) | {"test"}
    # What these do themselves.
    run |= {"lint", "unit"} if "check" in run else set()
    assert named - BY_HAND - run - run_elsewhere() == set()
    scenarios = re.findall(r"SCENARIO=(\w+)(?: TEST=(\S+))?", code(page))
    assert {scenario for scenario, _ in scenarios} - {"name"} <= SCENARIOS
    assert [one for one in scenarios if one[1] and not (PROJECT / f"molecule/{one[0]}/tests/{one[1]}").exists()] == []


def run_elsewhere() -> set[str]:
    """Targets that unit tests check: what make fuzz and make role-readmes run."""
    assert "targets" in TESTS and "role_readmes.made" in TESTS
    return {"fuzz", "role-readmes"}


@pytest.mark.parametrize("page", TEXTS)
def test_its_playbooks_are_run(page):
    names = re.findall(r"playbooks/(\w+\.yml)", code(page))
    names += [f"{{COLLECTION}}.{name}" for name in re.findall(r"playbook .*zulip_email\.gateway\.(\w+)", code(page))]
    assert [name for name in names if name not in TESTS] == []


@pytest.mark.parametrize("page", TEXTS)
def test_its_commands_of_the_gateway_are_run(page):
    for command, rest in re.findall(r"zulip-email-gateway ([a-z]+)([^`\n]*)", code(page)):
        told = rest.split("   ")[0]
        words = {"quarantine": r"quarantine (list|show|replay|retry|drop)"}.get(command, command)
        assert re.search(rf"(?:gateway|GATEWAY\}}?|PROGRAM\}}?)[\"', ]+{words}", TESTS), f"no test runs {command}"
        for option in re.findall(r"--[a-z-]+", told):
            assert option in TESTS, f"no test runs zulip-email-gateway {command} {option}"


def code(page: str) -> str:
    """What is to be typed: indented or in `...`."""
    text = TEXTS[page]
    return "\n".join([*re.findall(r"^    .*$", text, re.MULTILINE), *re.findall(r"`[^`]+`", text)])


def test_the_program_has_a_list_of_its_modules():
    """With the job of each, in its docstring."""
    modules = {path.stem for path in (PROJECT / "files/email_gateway/email_gateway").glob("*.py")} - {"__init__"}
    assert {name for name in modules if not re.search(rf"\b{name}\b", email_gateway.__doc__ or "")} == set()


def test_figures_of_make_bench_stand_in_the_readme_as_in_architecture():
    """In its third column, and in the second there."""
    rows = [row for row in TEXTS["README.md"].splitlines() if row.endswith("| `make bench` |")]
    costs = TEXTS["docs/architecture.md"].partition("## What it costs")[2].partition("## ")[0]
    measured = set(
        re.findall(r"\d[\d.]*(?: s| MiB)?", " ".join(row.split(" | ")[1] for row in costs.splitlines() if " | " in row))
    )
    ours = [row.split("|")[3].strip() for row in rows]
    assert ours and set(ours) <= measured, (ours, measured)
