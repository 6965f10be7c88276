"""A time that is not overrun: nothing is started that will hardly end in it, and what does is interrupted."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class OutOfTime(BaseException):
    """The time of the run is over; no `except Exception` of somebody else's keeps it."""


class Budget:
    """Minutes from now on.  What has run so far says how much faster or slower than expected this device is."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes
        self.expected, self.taken = 0.0, 0.0

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    @property
    def pace(self) -> float:
        """How often longer than expected measurements take here; at least 1, as the next one may be another kind."""
        return max(1.0, self.taken / self.expected) if self.expected else 1.0

    def allows(self, seconds: float) -> bool:
        return seconds * self.pace <= self.left

    @contextmanager
    def spent_on(self, seconds: float) -> Iterator[None]:
        """Interrupts what runs inside when no time is left.  seconds: how long it was expected to take"""

        def stop(*_: Any) -> None:
            raise OutOfTime

        began, before = time.monotonic(), signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, max(self.left, 0.001))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            self.expected += seconds
            self.taken += time.monotonic() - began
