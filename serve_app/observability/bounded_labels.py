"""Which adapters have metrics of their own: those asked for most of late, and never more than a fixed number.

Owns the choice. A metric system keeps every label that it was ever told for as long as the process lives, so what is
bounded is not only how many adapters are named now, but how many ever are. Must not know metrics.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

OTHER = "other"
PRIVATE = "private"

HALF_LIFE_S = 3600.0
# How many uses of late it takes to push out another, and how many times as many as that other's.
PUSHING_USES = 5.0
PUSHING_FACTOR = 2.0
# How many names a process may tell in its life, and how many it counts without telling, for each that is named now.
NAMES_PER_PLACE = 10
COUNTED_PER_PLACE = 10


@dataclass(frozen=True, slots=True)
class _Uses:
    """Uses, each of which counts half as much after `HALF_LIFE_S`: `score` as it was at `at_s`."""

    score: float
    at_s: float

    def now(self, now_s: float) -> float:
        return self.score * 0.5 ** ((now_s - self.at_s) / HALF_LIFE_S)


class BoundedLabels:
    """The adapters that are told by their names, of all that are asked for.

    Invariants: at most `places` are named at a time, at most `NAMES_PER_PLACE * places` in the life of the object, and
    at most `COUNTED_PER_PLACE * places` more are kept count of. A place that is free goes to whoever comes; one that
    is taken, to who is asked for clearly more often, so that a walk through all adapters pushes nobody out.
    """

    def __init__(self, places: int, *, clock: Callable[[], float]) -> None:
        """Name nobody yet; `clock` is in monotonic seconds."""
        self._places = places
        self._clock = clock
        self._named: set[str] = set()
        self._ever_named: set[str] = set()
        self._uses: dict[str, _Uses] = {}

    def label(self, adapter: str) -> str:
        """Count one use of an adapter, and return what it is called in metrics: its id, or "other"."""
        if not self._places:
            return OTHER
        now_s = self._clock()
        known = self._uses.get(adapter)
        score = 1.0 + (known.now(now_s) if known is not None else 0.0)
        self._uses[adapter] = _Uses(score, now_s)
        if adapter not in self._named and self._may_be_named(adapter) and self._claim_slot(score, now_s):
            self._named.add(adapter)
            self._ever_named.add(adapter)
        self._forget_one(now_s)
        return adapter if adapter in self._named else OTHER

    def _may_be_named(self, adapter: str) -> bool:
        return adapter in self._ever_named or len(self._ever_named) < self._places * NAMES_PER_PLACE

    def _claim_slot(self, score: float, now_s: float) -> bool:
        """Find a place for someone with a score, and free it where that is possible."""
        if len(self._named) < self._places:
            return True
        least = min(self._named, key=lambda name: self._uses[name].now(now_s))
        if score < max(PUSHING_USES, PUSHING_FACTOR * self._uses[least].now(now_s)):
            return False
        self._named.remove(least)
        return True

    def _forget_one(self, now_s: float) -> None:
        if len(self._uses) > self._places * (1 + COUNTED_PER_PLACE):
            unnamed = (name for name in self._uses if name not in self._named)
            del self._uses[min(unnamed, key=lambda name: self._uses[name].now(now_s))]
