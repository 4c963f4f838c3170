"""How the minutes are split over the stages."""

from __future__ import annotations

import time
from collections.abc import Sequence

#: Each stage's part of the time, in seconds of a run of some 13 minutes.
SHARES = {"smoke": 90, "build": 50, "core": 80, "test": 240, "bench": 280, "sanitize": 110}
#: What a stage may take at most: what it has to do ends.
MOST = {"smoke": 120.0, "core": 180.0, "sanitize": 180.0}
#: Kept for the summary, and for processes that have to be ended.
RESERVE = 6.0


class Clock:
    """Seconds that are left."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self.end - time.monotonic()


def share(stage: str, later: Sequence[str], left: float) -> float:
    """The seconds that a stage may take of those that are left before it and the ``later`` ones.

    By its share among them, so that what a stage does not spend goes to all that follow it.
    """
    total = SHARES[stage] + sum(SHARES[s] for s in later)
    return max(0.0, min(left * SHARES[stage] / total, MOST.get(stage, float("inf"))))
