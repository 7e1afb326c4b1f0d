"""Which adapters get their own label in metrics: the most requested ones, at most a fixed number.

Owns the choice. A metric system keeps every label for as long as the process lives, so both the number of present
labels and the number of all labels ever used are limited. Must not know metrics.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

OTHER = "other"
PRIVATE = "private"

HALF_LIFE_S = 3600.0
# The recent uses that a new label needs to replace another, and the factor by which it must exceed that one.
PUSHING_USES = 5.0
PUSHING_FACTOR = 2.0
# Per label: how many names a process may ever use, and how many further adapters it counts without a label.
NAMES_PER_SLOT = 10
COUNTED_PER_SLOT = 10


@dataclass(frozen=True, slots=True)
class _Uses:
    """A use count that decays by half in `HALF_LIFE_S`; `score` is its value at `at_s`."""

    score: float
    at_s: float

    def now(self, now_s: float) -> float:
        return self.score * 0.5 ** ((now_s - self.at_s) / HALF_LIFE_S)


class BoundedLabels:
    """Limits how many adapters have their own label.

    Invariants: at most `slots` labels at a time, at most `NAMES_PER_SLOT * slots` in the life of the object, and
    counts of at most `COUNTED_PER_SLOT * slots` further adapters. A free slot goes to the next adapter; a used one only
    to an adapter with clearly more requests, so that one pass over all adapters replaces none.
    """

    def __init__(self, slots: int, *, clock: Callable[[], float]) -> None:
        """Start without labels; `clock` returns monotonic seconds."""
        self._slots = slots
        self._clock = clock
        self._named: set[str] = set()
        self._ever_named: set[str] = set()
        self._uses: dict[str, _Uses] = {}

    def label(self, adapter: str) -> str:
        """Count one use of an adapter and return its label: its id, or "other"."""
        if not self._slots:
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
        return adapter in self._ever_named or len(self._ever_named) < self._slots * NAMES_PER_SLOT

    def _claim_slot(self, score: float, now_s: float) -> bool:
        """Return whether there is a slot for an adapter with this score; evicts another label if needed."""
        if len(self._named) < self._slots:
            return True
        least = min(self._named, key=lambda name: self._uses[name].now(now_s))
        if score < max(PUSHING_USES, PUSHING_FACTOR * self._uses[least].now(now_s)):
            return False
        self._named.remove(least)
        return True

    def _forget_one(self, now_s: float) -> None:
        if len(self._uses) > self._slots * (1 + COUNTED_PER_SLOT):
            unnamed = (name for name in self._uses if name not in self._named)
            del self._uses[min(unnamed, key=lambda name: self._uses[name].now(now_s))]
