"""How long what one ingress replica has sent to a base will take: what a caller who is refused is told to wait.

Owns the estimate, from what went out and came back here; pure but for the clock. Must not know replicas or Ray.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager

# How far back the measured rate looks, in seconds with work out.
WINDOW_S = 60.0
# Until anything has come back.
UNKNOWN_S = 5
MAX_RETRY_AFTER_S = 600


class Pressure:
    """The work that one ingress replica has out at one base, and how fast it comes back."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._out = 0
        self._out_units = 0.0
        self._done_units = 0.0
        self._busy_s = 0.0
        self._counted_at = clock()

    @contextmanager
    def sending(self, units: float) -> Generator[None]:
        """Count so much work as out for the time of the block, and as done where that ends well."""
        self._count()
        self._out += 1
        self._out_units += units
        is_done = False
        try:
            yield
            is_done = True
        finally:
            self._count()
            self._out -= 1
            self._out_units = self._out_units - units if self._out else 0.0
            if is_done:
                self._done_units += units

    def retry_after_s(self) -> int:
        """Return the whole seconds after which all that is out will be done at the rate of late."""
        self._count()
        if not self._done_units:
            return UNKNOWN_S
        drain_s = self._out_units * self._busy_s / self._done_units
        return max(1, min(MAX_RETRY_AFTER_S, math.ceil(drain_s)))

    def _count(self) -> None:
        now = self._clock()
        passed_s, self._counted_at = now - self._counted_at, now
        if self._out:
            share = math.exp(-passed_s / WINDOW_S)
            self._busy_s = self._busy_s * share + passed_s
            self._done_units *= share
