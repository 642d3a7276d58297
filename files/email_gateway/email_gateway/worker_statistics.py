"""The statistics that Zulip's email_mirror queue worker writes about itself.

Zulip's limiter counts a mail when the worker consumes it, so the pacing has to
know when that was. The worker (zerver/worker/base.py) replaces a small JSON file:

- when it has consumed all that it had fetched: queue_last_emptied_timestamp and
  update_time are then the same moment. It is idle from then on.
- when it takes up a mail after having been idle: update_time alone moves on.
- when it starts: as if it had just emptied the queue, which it has not. There is
  no recent_average_consume_time then, and that is how to tell.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

# Both stamps of one write are taken within well under this time (seconds).
_SAME_MOMENT = 0.1
# An idle worker takes up a new mail within milliseconds. One that has stayed
# idle for this long (seconds) had nothing left to take up.
STABLE = 0.5
# The same right after its start: it has to connect to RabbitMQ first.
STABLE_AFTER_START = 15.0
# The statistics are of no use when they are from the future (seconds allowed).
_CLOCK_TOLERANCE = 2.0


class Statistics(NamedTuple):
    """emptied: Unix time of the last emptying; idle: nothing taken up since;
    started: the worker has consumed nothing since its start."""

    emptied: float
    idle: bool
    started: bool

    def settled(self, now: float) -> bool:
        """True if the worker, when it runs, had consumed everything by `emptied`."""
        return self.idle and not self.started and now - self.emptied >= STABLE

    def found_nothing(self, now: float) -> bool:
        """True if the worker, after its start at `emptied`, has found nothing to do."""
        return self.idle and self.started and now - self.emptied >= STABLE_AFTER_START


def read(path: Path, now: float) -> Statistics | None:
    """The worker's statistics, or None where they are missing or make no sense."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        emptied, updated = float(data["queue_last_emptied_timestamp"]), float(data["update_time"])
        average = data["recent_average_consume_time"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not 0 < emptied <= updated + _SAME_MOMENT or updated > now + _CLOCK_TOLERANCE:
        return None
    return Statistics(emptied, idle=updated - emptied < _SAME_MOMENT, started=average is None)
