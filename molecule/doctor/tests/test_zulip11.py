"""doctor on a server with Zulip 11; the report."""

from __future__ import annotations

import pytest
from conftest import ZulipHost
from diagnoses import *  # noqa: F403
from paper import *  # noqa: F403


@pytest.fixture
def mx(host) -> ZulipHost:
    return host("mx2")
