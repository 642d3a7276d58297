"""What an operator types, and where."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from conftest import PROJECT

# What is not part of the project, or of no use to those who run it.
_OURS = shutil.ignore_patterns(".*", "__pycache__", "bench", "tests", "molecule")


def checkout(folder: Path) -> Path:
    """The project as somebody has copied it."""
    shutil.copytree(PROJECT, folder, symlinks=True, ignore=_OURS)
    return folder


def playbook(
    host: str, *arguments: str, commands: Path, folder: Path, site: str = "playbooks/site.yml"
) -> subprocess.CompletedProcess[str]:
    """ansible-playbook of the folder `commands`, run in `folder`, with no ansible.cfg to help."""
    shared = PROJECT / "molecule/shared/inventory"
    inventories = ("-i", str(shared), "-i", str(PROJECT / "molecule/servers/inventory.yml"))
    return subprocess.run(
        (str(commands / "ansible-playbook"), *inventories, "--limit", host, site, *arguments),
        cwd=folder,
        env={
            "PATH": os.environ["PATH"],
            "HOME": os.environ["HOME"],
            "LC_ALL": "C.UTF-8",
            "ZEG_CACHE": os.environ["ZEG_CACHE"],
            "CONTAINERS_CONF": os.environ.get("CONTAINERS_CONF", ""),
            "MOLECULE_SCENARIO_NAME": "servers",
            "ANSIBLE_CALLBACK_RESULT_FORMAT": "json",
            "ANSIBLE_NOCOLOR": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
