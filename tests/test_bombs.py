"""Whatever a stranger sends, what looks into it takes little time and memory (bombs.py)."""

from __future__ import annotations

import pytest
from bombs import TRIALS, needed


@pytest.mark.parametrize("trial", TRIALS)
def test_time_and_memory(trial):
    for one in needed(trial):
        print(f"{one.seconds:.3f} s  {one.mebibytes:5.1f} MiB  {one.what}: {one.result}")  # pytest -rP shows it
        assert one.seconds <= one.most_seconds and one.mebibytes <= TRIALS[trial].mebibytes, one
