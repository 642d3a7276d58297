"""Attacks on a server with Zulip 10."""

from __future__ import annotations

import pytest
from attacks import fresh
from conftest import ZulipHost
from neighbours import *  # noqa: F403
from network import *  # noqa: F403
from strangers import *  # noqa: F403
from unusual import *  # noqa: F403


@pytest.fixture
def mx(host) -> ZulipHost:
    return fresh(host("mx1"), neighbour=host("mx2"), version=10)
