"""Kills the run after its Nth task that changed something (INTERRUPT_AFTER), as a power cut would."""

from __future__ import annotations

import os
import signal

from ansible.plugins.callback import CallbackBase

DOCUMENTATION = "name: interrupt\ntype: aggregate\nshort_description: kill the run\ndescription: [kill the run]\n"


class CallbackModule(CallbackBase):
    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "interrupt"

    def __init__(self) -> None:
        super().__init__()
        self.left = int(os.environ["INTERRUPT_AFTER"])

    def v2_runner_on_ok(self, result) -> None:
        self.left -= bool(result._result.get("changed"))
        if self.left <= 0:
            os.killpg(os.getpgrp(), signal.SIGKILL)
