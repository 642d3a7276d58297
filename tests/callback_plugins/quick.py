"""For make test: a module that one run of Ansible has packed for sending serves the others (folder PACKED_MODULES).

Ansible keeps them for a run only, and takes a quarter of its CPU to pack them anew where nothing is to change.
"""

from __future__ import annotations

import os
from pathlib import Path

from ansible import constants
from ansible.plugins.callback import CallbackBase

DOCUMENTATION = "name: packed_modules\ntype: aggregate\nshort_description: keep modules\ndescription: [keep modules]\n"


class CallbackModule(CallbackBase):
    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "packed_modules"
    CALLBACK_NEEDS_ENABLED = True

    def __init__(self) -> None:
        super().__init__()
        # Where _find_module_utils looks first, and what it locks (ansible/executor/module_common.py).
        (Path(constants.DEFAULT_LOCAL_TMP) / "ansiballz_cache").symlink_to(os.environ["PACKED_MODULES"])
