"""Floods and junk in front of Zulip 11."""

from __future__ import annotations

import pytest
from conftest import ZulipHost
from floods import *  # noqa: F403
from floods import fresh


@pytest.fixture
def mx(host) -> ZulipHost:
    return fresh(host("mx2"), neighbour=host("mx1"), calm=host("mx3"))
