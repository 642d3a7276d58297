"""Several hosts in one run."""

from __future__ import annotations

import os
import re
import subprocess

import pytest
from conftest import PROJECT, ZulipHost

HOSTS = "mxd.example.com,mxe.example.com,mxf.example.com"


@pytest.fixture
def mx(host) -> ZulipHost:
    return host("mxd")


def test_a_fleet_with_one_broken_host(mx, host):
    """All three from off; the broken one is named, the others are finished."""
    mx.sh("mv /home/zulip/deployments/current /home/zulip/deployments/aside")
    command = ["ansible-playbook", "-i", "molecule/shared/inventory", "-i", "molecule/lifecycle/inventory.yml"]
    environment = {**os.environ, "MOLECULE_SCENARIO_NAME": "lifecycle", "ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg")}
    done = subprocess.run(
        [*command, "playbooks/site.yml", "--limit", HOSTS, "-e", "at_a_time=2"],
        cwd=PROJECT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    mx.sh("mv /home/zulip/deployments/aside /home/zulip/deployments/current")
    assert done.returncode != 0 and "there is no Zulip on this host" in done.stdout
    failed = dict(re.findall(r"^(?:.\[[\d;]*m)?(mx.)\.example\.com\b.*failed=(\d)", done.stdout, re.MULTILINE))
    assert failed == {"mxd": "1", "mxe": "0", "mxf": "0"}, done.stdout[-2000:]
    for name in ("mxe", "mxf"):
        assert host(name).host.socket("tcp://0.0.0.0:25").is_listening
