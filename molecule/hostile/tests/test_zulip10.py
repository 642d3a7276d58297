"""Attacks on a server with Zulip 10."""

from __future__ import annotations

import pytest
from conftest import ZulipHost

pytest.register_assert_rewrite("attacks", "strangers", "network", "neighbours", "unusual")
from attacks import fresh  # noqa: E402
from neighbours import *  # noqa: E402, F403
from network import *  # noqa: E402, F403
from strangers import *  # noqa: E402, F403
from unusual import *  # noqa: E402, F403


@pytest.fixture
def mx(host) -> ZulipHost:
    return fresh(host("mx1"), neighbour=host("mx2"), version=10)
