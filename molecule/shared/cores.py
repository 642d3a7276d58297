"""Versions of ansible-core besides the project's own, as operators have them: with dnspython, and nothing else."""

from __future__ import annotations

import fcntl
import platform
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import testhosts

# The oldest that is supported, and the one after; requirements.txt has the newest for the project's own Python.
OLDER = ("2.17", "2.18")


@contextmanager
def _alone(name: str) -> Iterator[Path]:
    """The folder `name` in the cache, which only one process makes at a time."""
    testhosts.CACHE.mkdir(exist_ok=True)
    with (testhosts.CACHE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield testhosts.CACHE / name


def older(version: str) -> Path:
    """The folder with the commands of ansible-core `version` (made once), for the Python that runs this."""
    with _alone(f"ansible-{version}") as folder:
        if not (folder / "complete").exists():
            testhosts.run(sys.executable, "-m", "venv", "--clear", str(folder))
            pip = (str(folder / "bin/pip"), "install", "--quiet", "--disable-pip-version-check")
            testhosts.run(*pip, f"ansible-core~={version}.0", "dnspython")
            (folder / "complete").touch()
    return folder / "bin"


def newest(python: str) -> Path:
    """A folder with the newest ansible-core for another Python than this one, to be on that one's PYTHONPATH."""
    with _alone(f"ansible-newest-{python}") as folder:
        if not (folder / "complete").exists():
            kinds = (f"manylinux{kind}_{platform.machine()}" for kind in ("2014", "_2_17", "_2_28"))
            with tempfile.TemporaryDirectory() as wheels:
                testhosts.run(
                    *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"),
                    *("--dest", wheels, "--only-binary=:all:", f"--python-version={python}"),
                    *(f"--platform={kind}" for kind in kinds),
                    *("ansible-core", "dnspython"),
                )
                for wheel in Path(wheels).iterdir():
                    zipfile.ZipFile(wheel).extractall(folder)
            (folder / "complete").touch()
    return folder
