"""Writes into the file DURATIONS how long the tasks of each module took: JSON, in seconds."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from pathlib import Path

from ansible.plugins.callback import CallbackBase

DOCUMENTATION = "name: durations\ntype: aggregate\nshort_description: time by module\ndescription: [time by module]\n"


class CallbackModule(CallbackBase):
    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "durations"

    def __init__(self) -> None:
        super().__init__()
        self.seconds: Counter[str] = Counter()
        self.action, self.since = "", time.monotonic()

    def v2_playbook_on_task_start(self, task, is_conditional) -> None:
        now = time.monotonic()
        self.seconds[self.action] += now - self.since
        self.action, self.since = task.action, now

    def v2_playbook_on_stats(self, stats) -> None:
        self.v2_playbook_on_task_start(type("End", (), {"action": ""}), False)
        Path(os.environ["DURATIONS"]).write_text(json.dumps(self.seconds))
