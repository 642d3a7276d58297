"""What becomes of mail inside Zulip 10."""

from __future__ import annotations

import pytest
from conftest import ZulipHost
from rows import *  # noqa: F403
from rows import fresh


@pytest.fixture
def mx(host) -> ZulipHost:
    return fresh(host("mx1"), 10)
