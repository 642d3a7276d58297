"""How long something as a whole may take, whatever its single steps do."""

from __future__ import annotations

import time


class Deadline:
    """Ends `seconds` from now."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self, most: float = float("inf")) -> float:
        """Seconds left, `most` at most; raises TimeoutError when there are none."""
        seconds = self._end - time.monotonic()
        if seconds <= 0:
            raise TimeoutError
        return min(seconds, most)
