"""docs/troubleshooting.md has every message that stops site.yml, keeps mail waiting, or sends it back."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

PROJECT = Path(__file__).parents[1]
# What is filled in when the message is written.
HOLE = "\0"
# What says something about mail, or about this host, to somebody.
CALLS = {"Unfit", "Trouble", "Declined", "Deferred", "Refused", "Rejection", "Finding", "NeverAccepted"}
# Of a message's fixed text; with less of it only what is filled in says something.
LEAST = 20


def tasks_in(tasks: list[dict[str, Any]] | None) -> Iterator[dict[str, Any]]:
    for task in tasks or []:
        yield task
        for part in ("block", "rescue"):
            yield from tasks_in(task.get(part))


def of_roles() -> Iterator[tuple[str, str]]:
    for path in sorted(PROJECT.glob("roles/*/tasks/*.yml")):
        for task in tasks_in(yaml.safe_load(path.read_text())):
            for module, key in (("assert", "fail_msg"), ("fail", "msg"), ("wait_for", "msg")):
                text = " ".join(str((task.get(f"ansible.builtin.{module}") or {}).get(key, "")).split())
                yield path.name, re.sub(r"\{\{.*?\}\}|\{%.*?%\}", HOLE, text)


def of_fault_templates() -> Iterator[tuple[str, str]]:
    """The texts between the conditions of roles/*/templates/faults*.j2."""
    for path in sorted(PROJECT.glob("roles/*/templates/faults*.j2")):
        text = re.sub(r"\{#.*?#\}|\{% (set|for|endfor).*?%\}", "", path.read_text(), flags=re.DOTALL)
        for message in re.split(r"\{% .*?%\}", text, flags=re.DOTALL):
            yield path.name, re.sub(r"\{\{.*?\}\}", HOLE, " ".join(message.split()))


def of_programs() -> Iterator[tuple[str, str]]:
    """The texts in calls of CALLS; of a name, what it was assigned in the same function."""
    paths = [*PROJECT.glob("plugins/modules/*.py"), *PROJECT.glob("plugins/action/*.py")]
    for path in sorted([*paths, *PROJECT.glob("files/email_gateway/email_gateway/*.py")]):
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef):
                continue
            known: dict[str, ast.expr] = {}
            for node in ast.walk(function):
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                    known.setdefault(node.targets[0].id, node.value)
            for node in ast.walk(function):
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") in CALLS:
                    good = node.args and getattr(node.args[0], "id", "") == "OK"
                    if not good and node.args:
                        # A finding has its remedy behind its text.
                        yield path.name, text_of(node.args[1 if node.func.id == "Finding" else -1], known)


def text_of(node: ast.expr, known: dict[str, ast.expr]) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part, known) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return text_of(node.value, known)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left, known) + text_of(node.right, known)
    if isinstance(node, ast.Name) and node.id in known:
        return text_of(known.pop(node.id), known)
    return HOLE


def patterns() -> list[re.Pattern[str]]:
    """Each quoted message of the document; "..." in it is anything."""
    text = (PROJECT / "docs/troubleshooting.md").read_text()
    rows = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| `")]
    quoted = [phrase for row in rows for phrase in re.findall(r"`([^`]+)`", row)]
    return [re.compile(".*".join(re.escape(part.strip()) for part in phrase.split("..."))) for phrase in quoted]


def test_every_message_is_listed():
    messages = {
        (file, text)
        for file, text in (*of_roles(), *of_fault_templates(), *of_programs())
        if len(text.replace(HOLE, "")) >= LEAST
    }
    listed = patterns()
    missing = [one for one in sorted(messages) if not any(pattern.search(one[1]) for pattern in listed)]
    assert [(file, text.replace(HOLE, "...")) for file, text in missing] == []
    assert len(messages) > 150
