"""Floods and junk in front of Zulip 10."""

from __future__ import annotations

import pytest
from conftest import ZulipHost
from floods import *  # noqa: F403
from floods import fresh


@pytest.fixture
def mx(host) -> ZulipHost:
    return fresh(host("mx1"), neighbour=host("mx2"), calm=host("mx3"))
