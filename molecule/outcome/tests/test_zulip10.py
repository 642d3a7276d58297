"""What becomes of mail inside Zulip 10."""

from __future__ import annotations

import pytest
from conftest import ZulipHost

pytest.register_assert_rewrite("rows")
from rows import *  # noqa: E402, F403
from rows import fresh  # noqa: E402


@pytest.fixture
def mx(host) -> ZulipHost:
    return fresh(host("mx1"), 10)
