#!/usr/bin/python
"""Ansible module: one folder of Python modules, in one step.

ansible.builtin.copy takes a second or more for each file, leaves behind what a
newer version no longer has, and does not compile.
"""

from __future__ import annotations

import compileall
import ctypes
import importlib.util
import os
import shutil
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: python_package
short_description: Install a folder of Python modules
description:
  - Makes a folder hold exactly the given modules, owned by root, and compiles them for the host's own Python.
options:
  path:
    description: The folder.
    type: path
    required: true
  modules:
    description: File names and their contents.
    type: dict
    required: true
author: The Zulip email gateway maintainers
"""

EXAMPLES = r"""
- name: Install a package
  python_package:
    path: /usr/local/lib/example/package
    modules: {__init__.py: ""}
"""

RETURN = r"""
replaced:
  description: Names of the modules that were new, different or gone.
  type: list
  elements: str
  returned: always
"""


def differing(folder: Path, modules: dict[str, str]) -> list[str]:
    """Names of the modules that are not as they should be, or not compiled for this Python."""
    there = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.py")}
    # An upgrade of the system may have brought another Python, which compiles for itself.
    compiled = {name for name in there if Path(importlib.util.cache_from_source(str(folder / name))).exists()}
    return sorted(name for name in {*there, *modules} if there.get(name) != modules.get(name) or name not in compiled)


def exchange(one: Path, other: Path) -> None:
    """Let two folders change places in one step (renameat2(2)); OSError where the file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    AT_FDCWD, RENAME_EXCHANGE = -100, 2
    if libc.renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) != 0:
        raise OSError(ctypes.get_errno(), "cannot exchange two folders", str(one))


def install(folder: Path, modules: dict[str, str]) -> None:
    """Replace the folder as a whole, and at once: a mail that comes meanwhile finds all of one version or the other."""
    draft = folder.with_name(folder.name + ".new")
    shutil.rmtree(draft, ignore_errors=True)
    for needed in (folder.parent, draft):
        if not needed.exists():
            needed.mkdir()
            needed.chmod(0o755)
    for name, text in modules.items():
        (draft / name).write_text(text, encoding="utf-8")
        (draft / name).chmod(0o644)
    if not compileall.compile_dir(draft, stripdir=draft, prependdir=folder, quiet=2):
        raise OSError("the modules do not compile with this host's Python")
    (draft / "__pycache__").chmod(0o755)
    if not folder.exists():
        draft.rename(folder)
        return
    former = draft
    try:
        exchange(draft, folder)
    except OSError:  # as on ZFS before 2.2: for a moment there is none, and a mail that comes then is deferred
        former = folder.with_name(folder.name + ".old")
        shutil.rmtree(former, ignore_errors=True)
        folder.rename(former)
        draft.rename(folder)
    shutil.rmtree(former, ignore_errors=True)


def main() -> None:
    module = AnsibleModule(
        argument_spec={"path": {"type": "path", "required": True}, "modules": {"type": "dict", "required": True}},
        supports_check_mode=True,
    )
    folder = Path(module.params["path"])
    replaced = differing(folder, module.params["modules"])
    if replaced and not module.check_mode:
        try:
            install(folder, module.params["modules"])
        except OSError as error:
            module.fail_json(msg=f"cannot install {folder}: {error}")
    lines = "".join(f"{folder}/{name}\n" for name in replaced)
    module.exit_json(changed=bool(replaced), replaced=replaced, diff={"before": "", "after": lines})


if __name__ == "__main__":
    main()
