"""The requests that one ingress replica has sent to a base: whether it was full lately, and when it will not be.

Owns both estimates, from what went out, came back and was refused here; pure but for the clock. Must not know replicas
or Ray.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager

from serve_app.config import AppConfig

# How far back the measured rate looks, in seconds with work out.
WINDOW_S = 60.0
# Until anything has come back.
UNKNOWN_S = 5
MAX_RETRY_AFTER_S = 600
# For so long after a refusal a base counts as full.
FULL_S = 1.0


def most_held(config: AppConfig) -> int:
    """Return how many requests may wait for all bases, in all ingress replicas and with as many replicas as allowed."""
    return sum(
        base.replica.max_queued_requests * config.ingress.max_replicas
        + base.replica.max_ongoing_requests * base.autoscaling.max_replicas
        for base in config.bases
    )


class Backpressure:
    """The work that one ingress replica has out at one base, and how fast it comes back."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._out = 0
        self._by_share: Counter[str] = Counter()
        self._out_units = 0.0
        self._done_units = 0.0
        self._busy_s = 0.0
        self._counted_at = clock()
        self._refused_at = -math.inf

    @property
    def in_flight(self) -> int:
        """How many requests are out."""
        return self._out

    def held_by(self, share: str) -> int:
        """Return how many requests of a caller are out."""
        return self._by_share[share]

    @property
    def was_full_lately(self) -> bool:
        """Whether Serve refused anything for want of room a moment ago."""
        return self._clock() - self._refused_at <= FULL_S

    def record_rejection(self) -> None:
        """Note that Serve did not take what was being sent."""
        self._refused_at = self._clock()

    @contextmanager
    def track(self, units: float, share: str = "") -> Generator[None]:
        """Count so much work as out for the time of the block, for a caller, and as done where that ends well."""
        self._count()
        self._out += 1
        self._by_share[share] += 1
        self._out_units += units
        is_done = False
        try:
            yield
            is_done = True
        finally:
            self._count()
            self._out -= 1
            self._by_share -= Counter((share,))
            self._out_units = self._out_units - units if self._out else 0.0
            if is_done:
                self._done_units += units

    def retry_after_s(self) -> int:
        """Return the whole seconds after which all that is out will be done at the recent rate."""
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
