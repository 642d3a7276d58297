"""What doctor says of one thing it has looked at."""

from __future__ import annotations

import subprocess
from typing import NamedTuple

OK, WARN, WRONG = "ok", "warn", "WRONG"


class Finding(NamedTuple):
    """One line of the report. level: OK, WARN or WRONG; remedy: the command or the variable that mends it."""

    level: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.level:<6} {self.text}" + (f"; {self.remedy}" if self.remedy else "")


def found(good: bool, text: str, remedy: str) -> Finding:
    """Right, or wrong with what mends it."""
    return Finding(OK, text) if good else Finding(WRONG, text, remedy)


def run(*command: str, input: str | None = None, seconds: float = 60) -> subprocess.CompletedProcess[str]:
    """A command's output and status; 127 where it cannot be run, or takes longer than `seconds`."""
    try:
        return subprocess.run(
            command, input=input, capture_output=True, text=True, errors="replace", timeout=seconds, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 127, "", str(error))
