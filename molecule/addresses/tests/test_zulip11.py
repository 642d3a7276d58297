"""Addresses in front of Zulip 11."""

from __future__ import annotations

import pytest
from conftest import ZulipHost
from forged import *  # noqa: F403
from names import *  # noqa: F403
from names import fresh


@pytest.fixture
def mx(host) -> ZulipHost:
    return fresh(host("mx2"))
