"""Which entries of a cache must go so that its bytes hold: least recently used first, never one in use.

Owns the decision and the accounting. Must not know what an entry is, where it lies, the time or threads:
whoever owns the bytes carries the plan out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Entry:
    """One cached thing and its weight."""

    key: str
    size_bytes: int
    is_pinned: bool = False


@dataclass(frozen=True, slots=True)
class EvictionPlan:
    """The keys to drop, in order; `excess_bytes` is how far pinned entries still exceed the budget."""

    evict: tuple[str, ...] = ()
    excess_bytes: int = 0


def plan_eviction(entries: Iterable[Entry], needed_bytes: int, budget_bytes: int) -> EvictionPlan:
    """Choose what to drop so that `needed_bytes` more fit; `entries` come least recently used first.

    An entry larger than the whole budget goes before all others: while it stays, nothing else can.
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
    """The accounts of one cache: sizes, order of use, pins.

    Invariants: a pinned entry is in no plan. After every call the entries fit the budget, or all of them are
    pinned. A key may be pinned before its entry exists, so that it is safe from the moment it arrives. Every
    plan that is returned is already booked: the owner drops exactly those keys. Not thread-safe.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self._sizes: dict[str, int] = {}
        self._pins: dict[str, int] = {}
        self._unwanted: set[str] = set()

    def __contains__(self, key: str) -> bool:
        """Tell whether the key has an entry."""
        return key in self._sizes

    @property
    def keys(self) -> tuple[str, ...]:
        """Every entry, least recently used first."""
        return tuple(self._sizes)

    @property
    def pinned(self) -> frozenset[str]:
        """Every pinned key, whether it has an entry yet or not."""
        return frozenset(self._pins)

    def pin(self, key: str) -> None:
        """Hold the key until it is unpinned as often; counts as a use, and takes back an earlier `forget`."""
        self._pins[key] = self._pins.get(key, 0) + 1
        self._unwanted.discard(key)
        if key in self._sizes:
            self._sizes[key] = self._sizes.pop(key)

    def unpin(self, key: str) -> EvictionPlan:
        """Let go once; the plan drops whatever only pins kept beyond the budget."""
        count = self._pins.pop(key) - 1
        if count:
            self._pins[key] = count
            return EvictionPlan()
        if key in self._unwanted:
            return self._drop(key)
        return self._settle()

    def add(self, key: str, size_bytes: int) -> EvictionPlan:
        """Book an entry as just used, replacing one of the same key; the plan makes room for it.

        The plan may name the key itself, where it is unpinned and larger than the whole budget.
        """
        self.used_bytes += size_bytes - self._sizes.pop(key, 0)
        self._sizes[key] = size_bytes
        return self._settle()

    def forget(self, key: str) -> EvictionPlan:
        """Drop the entry now, or as soon as its last pin goes."""
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
