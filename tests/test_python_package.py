"""The program's modules: replaced as a whole, and compiled for the Python that runs them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import python_package

MODULES = {"one.py": "a = 1\n", "two.py": "b = 2\n"}


def installed(tmp_path: Path) -> Path:
    folder = tmp_path / "lib/package"
    (tmp_path / "lib").mkdir()
    python_package.install(folder, MODULES)
    assert python_package.differing(folder, MODULES) == []
    return folder


def test_what_was_changed_or_added_is_noticed(tmp_path):
    folder = installed(tmp_path)
    (folder / "one.py").write_text("a = 2\n")
    (folder / "three.py").touch()
    assert python_package.differing(folder, MODULES) == ["one.py", "three.py"]


def test_another_python_compiles_anew(tmp_path):
    """After an upgrade of the system."""
    folder = installed(tmp_path)
    compiled = Path(importlib.util.cache_from_source(str(folder / "one.py")))
    compiled.rename(compiled.with_name("one.cpython-39.pyc"))
    assert python_package.differing(folder, MODULES) == ["one.py"]
    python_package.install(folder, MODULES)
    assert sorted(path.name for path in compiled.parent.iterdir()) == sorted(
        Path(importlib.util.cache_from_source(name)).name for name in MODULES
    )
