"""Which entries a cache must evict to stay in its byte budget: the least recently used, never a pinned one.

Owns the decision and the accounting. Must not know what an entry is, where it is, the time or threads: the owner of the
bytes carries the plan out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Entry:
    """One cached item and its size."""

    key: str
    size_bytes: int
    is_pinned: bool = False


@dataclass(frozen=True, slots=True)
class EvictionPlan:
    """The keys to evict, in order; `excess_bytes` is by how much pinned entries still exceed the budget."""

    evict: tuple[str, ...] = ()
    excess_bytes: int = 0


def plan_eviction(entries: Iterable[Entry], needed_bytes: int, budget_bytes: int) -> EvictionPlan:
    """Choose what to evict so that `needed_bytes` more fit; `entries` are sorted by their last use, oldest first.

    An entry larger than the whole budget is evicted first, because nothing else fits beside it.
    """
    known = tuple(entries)
    excess = sum(entry.size_bytes for entry in known) + needed_bytes - budget_bytes
    evict: list[str] = []
    for entry in sorted(known, key=lambda entry: entry.size_bytes <= budget_bytes):
        if excess <= 0:
            break
        if entry.is_pinned:
            continue
        evict.append(entry.key)
        excess -= entry.size_bytes
    return EvictionPlan(tuple(evict), max(excess, 0))


class ByteBudget:
    """Sizes, order of use and pins of one cache.

    Invariants: no plan contains a pinned entry. After every call the entries fit the budget, or all of them are pinned.
    A key may be pinned before its entry exists. A returned plan is already accounted for: the owner must evict exactly
    those keys. Not thread-safe.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self._sizes: dict[str, int] = {}
        self._pins: dict[str, int] = {}
        self._unwanted: set[str] = set()

    def __contains__(self, key: str) -> bool:
        """Whether the key has an entry."""
        return key in self._sizes

    @property
    def keys(self) -> tuple[str, ...]:
        """Every entry, least recently used first."""
        return tuple(self._sizes)

    @property
    def pinned(self) -> frozenset[str]:
        """Every pinned key, with or without an entry."""
        return frozenset(self._pins)

    def pin(self, key: str) -> None:
        """Pin the key once more; counts as a use, and cancels an earlier `forget`."""
        self._pins[key] = self._pins.get(key, 0) + 1
        self._unwanted.discard(key)
        if key in self._sizes:
            self._sizes[key] = self._sizes.pop(key)

    def unpin(self, key: str) -> EvictionPlan:
        """Remove one pin; the plan evicts what only pins had kept over the budget."""
        count = self._pins.pop(key) - 1
        if count:
            self._pins[key] = count
            return EvictionPlan()
        if key in self._unwanted:
            return self._drop(key)
        return self._settle()

    def add(self, key: str, size_bytes: int) -> EvictionPlan:
        """Add or replace an entry as just used; the plan evicts others for it.

        The plan may contain the key itself, if it is unpinned and larger than the whole budget.
        """
        self.used_bytes += size_bytes - self._sizes.pop(key, 0)
        self._sizes[key] = size_bytes
        return self._settle()

    def forget(self, key: str) -> EvictionPlan:
        """Evict the entry now, or when its last pin is removed."""
        if key not in self._sizes:
            return EvictionPlan()
        if key in self._pins:
            self._unwanted.add(key)
            return EvictionPlan()
        return self._drop(key)

    def _drop(self, key: str) -> EvictionPlan:
        self._remove(key)
        rest = self._settle()
        return EvictionPlan((key, *rest.evict), rest.excess_bytes)

    def _settle(self) -> EvictionPlan:
        if self.used_bytes <= self.budget_bytes:
            return EvictionPlan()
        entries = (Entry(key, size, key in self._pins) for key, size in self._sizes.items())
        plan = plan_eviction(entries, 0, self.budget_bytes)
        for key in plan.evict:
            self._remove(key)
        return plan

    def _remove(self, key: str) -> None:
        self.used_bytes -= self._sizes.pop(key)
        self._unwanted.discard(key)
