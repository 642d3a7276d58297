"""Whatever strangers, Zulip, a mailbox or a neighbour send: no promise is broken (fuzz/targets.py)."""

from __future__ import annotations

import ast
import os
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from targets import TARGETS

FUZZ = Path(__file__).parent / "fuzz"
# The same ones each time; with another number in the environment, others.
FEW = 60
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", FEW))


def words_of(name: str) -> list[bytes]:
    """What the language of a target is made of; a dictionary of libFuzzer's, which atheris reads as well."""
    return [ast.literal_eval(f"b{line}") for line in (FUZZ / "words" / name).read_text().splitlines()]


@pytest.mark.parametrize("name", TARGETS)
@given(data=st.data())
@settings(max_examples=EXAMPLES, derandomize=EXAMPLES == FEW, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_input(name, data):
    pieces = data.draw(st.lists(st.sampled_from(words_of(name)) | st.binary(max_size=8), max_size=20))
    TARGETS[name](b"".join(pieces))


@pytest.mark.parametrize("name", TARGETS)
def test_the_corpus(name):
    """What atheris has found (make fuzz), as it is and with an octet changed."""
    chance = random.Random(name)
    for path in sorted((FUZZ / "corpus" / name).glob("*")):
        data = path.read_bytes()
        TARGETS[name](data)
        place = chance.randrange(len(data) + 1)
        TARGETS[name](data[:place] + bytes([chance.randrange(256)]) + data[place + 1 :])
