"""doctor on a server with Zulip 10, and from the machine that runs Ansible."""

from __future__ import annotations

import pytest
from conftest import ZulipHost
from diagnoses import *  # noqa: F403
from outside import *  # noqa: F403


@pytest.fixture
def mx(host) -> ZulipHost:
    return host("mx1")
