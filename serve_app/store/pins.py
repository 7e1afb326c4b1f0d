"""Pins for the adapters of requests, within the budget of host memory.

Owns the order in which requests get their pins, and how long they wait. Must not know how adapters are loaded.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Collection, Mapping
from contextlib import suppress

from serve_app.errors import HostMemoryFull
from serve_app.store.budget import ByteBudget, EvictionPlan

_MAX_KNOWN_SIZES = 4096


class Pins:
    """Pins groups of keys, each group at once: all adapters of one request, which holds none while it waits.

    Invariants: pinned adapters fit the budget, or are one group's alone. Groups get their pins in the order in which
    they ask. Not thread-safe: for one event loop.
    """

    def __init__(self, budget: ByteBudget, *, wait_s: float) -> None:
        """Pin entries of `budget`; a group that waits longer than `wait_s` is refused."""
        self._budget = budget
        self._wait_s = wait_s
        self._sizes: dict[str, int] = {}
        self._waiting: deque[tuple[frozenset[str], asyncio.Future[None]]] = deque()

    async def pin(self, sizes: Mapping[str, int], *, is_again: bool = False) -> None:
        """Pin some keys once they fit; `sizes` are guesses, which count until the sizes are known.

        `is_again` says that the group had its pins and was found too large: it waits before all others.

        Raises:
            HostMemoryFull: others have held the memory for too long.
        """
        for key, size_bytes in sizes.items():
            self._sizes.setdefault(key, size_bytes)
        group = frozenset(sizes), asyncio.get_running_loop().create_future()
        (self._waiting.appendleft if is_again else self._waiting.append)(group)
        self._admit()
        try:
            await asyncio.wait_for(asyncio.shield(group[1]), self._wait_s)
        except TimeoutError:
            self._leave(group)
            raise HostMemoryFull from None
        except asyncio.CancelledError:
            self._leave(group)
            raise

    def learn(self, key: str, size_bytes: int) -> None:
        """Take the size of a key that was loaded."""
        self._sizes[key] = size_bytes
        if len(self._sizes) > _MAX_KNOWN_SIZES:
            pinned = self._budget.pinned
            self._sizes = {known: size for known, size in self._sizes.items() if known in pinned or known == key}
        self._admit()

    def exceeds(self, keys: Collection[str]) -> bool:
        """Whether a pinned group is too much beside what others have pinned."""
        return not self._fits(frozenset(keys))

    def unpin(self, keys: Collection[str]) -> list[EvictionPlan]:
        """Remove the pins of a group, and pin who waited for it; the plans are to be carried out."""
        plans = [self._budget.unpin(key) for key in keys]
        self._admit()
        return plans

    def _fits(self, keys: frozenset[str]) -> bool:
        pinned = self._budget.pinned
        if pinned <= keys:
            return True
        return sum(self._sizes.get(key, 0) for key in pinned | keys) <= self._budget.budget_bytes

    def _admit(self) -> None:
        while self._waiting and self._fits(self._waiting[0][0]):
            keys, admitted = self._waiting.popleft()
            for key in keys:
                self._budget.pin(key)
            admitted.set_result(None)

    def _leave(self, group: tuple[frozenset[str], asyncio.Future[None]]) -> None:
        if group[1].done():  # it got its pins at the same moment
            self.unpin(group[0])
        else:
            with suppress(ValueError):
                self._waiting.remove(group)
            self._admit()
