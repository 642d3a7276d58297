#!/usr/bin/env python3
"""make role-readmes: writes the table of variables into each role's README.md, from its meta/argument_specs.yml.

What stands outside the two marks is written by hand.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

PROJECT = Path(__file__).parents[1]
BEGIN, END = "<!-- make role-readmes: from here -->", "<!-- make role-readmes: to here -->"


def roles() -> list[str]:
    return sorted(path.parents[1].name for path in PROJECT.glob("roles/*/meta/argument_specs.yml"))


def readme(role: str) -> Path:
    return PROJECT / f"roles/{role}/README.md"


def made(role: str) -> str:
    """The README.md of a role as it should be. Raises ValueError where it has no marks."""
    path = readme(role)
    head, begin, rest = path.read_text().partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path.relative_to(PROJECT)} lacks a mark. Write both, each on its line: {BEGIN} and {END}")
    specs = yaml.safe_load((PROJECT / f"roles/{role}/meta/argument_specs.yml").read_text())
    return f"{head}{BEGIN}\n{table(specs['argument_specs']['main']['options'])}{END}{tail}"


def table(options: dict[str, dict[str, Any]]) -> str:
    """The options of an argument spec as a table in Markdown."""
    rows = [("variable", "type", "default", "meaning"), ("---", "---", "---", "---")]
    for name, option in options.items():
        default = "required" if option.get("required") else "not set"
        if "default" in option:
            default = f"`{written(option['default'])}`"
        rows.append((f"`{name}`", kind(option), default, option["description"].strip()))
    return "".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |\n" for row in rows)


def kind(option: dict[str, Any]) -> str:
    """The type, or what to choose from."""
    if "choices" in option:
        return ", ".join(f"`{written(choice)}`" for choice in option["choices"])
    return f"{option['type']} of {option['elements']}" if "elements" in option else str(option["type"])


def written(value: object) -> str:
    """A value as one writes it in YAML: quoted where it would be something else without."""
    is_plain = isinstance(value, str) and value.isalnum() and yaml.safe_load(value) == value
    return str(value) if is_plain else json.dumps(value)


if __name__ == "__main__":
    try:
        for each in roles():
            readme(each).write_text(made(each))
    except (OSError, ValueError) as error:
        sys.exit(f"role-readmes: {error}")
