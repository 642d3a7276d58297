"""What stands in the roles' files, for several of the unit tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

ROLES = Path(__file__).parents[1] / "roles"


def variables(role: str) -> dict[str, Any]:
    """The role's internal variables, as they are written."""
    files = sorted((ROLES / role / "vars/main").glob("*.yml"))
    return {name: value for file in files for name, value in yaml.safe_load(file.read_text()).items()}
