"""For make test, most of whose time is Ansible's: a run takes a quarter less CPU, on the controller and on the host.

Ansible packs the modules that it sends anew in each run, and as source, which the host compiles; and it looks for
garbage in each of the processes that it forks, one for each task.
"""

from __future__ import annotations

import base64
import compileall
import gc
import io
import os
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path
from py_compile import PycInvalidationMode

from ansible import constants
from ansible.executor.module_common import _CachedModule
from ansible.plugins.callback import CallbackBase

DOCUMENTATION = "name: quick\ntype: aggregate\nshort_description: less CPU\ndescription: [less CPU]\n"


def _compiled(encoded: bytes) -> bytes:
    """The ZIP archive (Base64) with a .pyc beside each .py. A host of another Python version goes by the .py."""
    whole = io.BytesIO(base64.b64decode(encoded))
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(whole, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.extractall(folder)
        compileall.compile_dir(
            folder, quiet=1, legacy=True, stripdir=folder, invalidation_mode=PycInvalidationMode.UNCHECKED_HASH
        )
        for file in Path(folder).rglob("*.pyc"):
            archive.write(file, file.relative_to(folder))
    return base64.b64encode(whole.getvalue())


class CallbackModule(CallbackBase):
    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "quick"
    CALLBACK_NEEDS_ENABLED = True

    def __init__(self) -> None:
        super().__init__()
        gc.freeze()
        gc.disable()
        # Modules that one run has packed (PACKED_MODULES) serve the others: here _find_module_utils looks first, and
        # keeps what it packs (ansible/executor/module_common.py).
        (Path(constants.DEFAULT_LOCAL_TMP) / "ansiballz_cache").symlink_to(os.environ["PACKED_MODULES"])
        dump = _CachedModule.dump
        _CachedModule.dump = lambda module, path: dump(replace(module, zip_data=_compiled(module.zip_data)), path)
