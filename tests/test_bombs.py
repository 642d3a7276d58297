"""Whatever a stranger sends, what looks into it takes little time and memory (bombs.py)."""

from __future__ import annotations

import re

import pytest
from bombs import BOMBS, measured, measured_alone
from email_gateway.header_repair import enterable
from email_gateway.postable import postable


@pytest.mark.parametrize("function", [postable, enterable])
@pytest.mark.parametrize("name", BOMBS)
def test_time(tmp_path, function, name):
    used, result = measured(function, name, tmp_path)
    print(f"{used:.2f} s, {result}")  # pytest -rP shows it: 0.4 s at most
    assert used <= 1


@pytest.mark.parametrize("function", [postable, enterable])
def test_memory(function):
    report = measured_alone(function.__module__, function.__name__)
    print(report)  # 8 MiB at most
    assert max(map(float, re.findall(r"([\d.]+) MiB", report))) <= 12
