"""Floods and junk in front of Zulip 10."""

from __future__ import annotations

import pytest
from conftest import ZulipHost

pytest.register_assert_rewrite("floods")
from floods import *  # noqa: E402, F403
from floods import fresh  # noqa: E402


@pytest.fixture
def mx(host) -> ZulipHost:
    return fresh(host("mx1"), neighbour=host("mx2"))
