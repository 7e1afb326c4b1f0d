"""Ray's record of the adapters that a replica holds: the ids by which Serve's routers know it.

Owns all that is used of Ray's multiplexer, public or not (`docs/routing.md` has the table). An id is a key: the adapter
itself is in the store, so that Ray's eviction, by count and blind to use, never takes one from a running request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from typing import Any

from ray import serve

# Where Ray keeps the multiplexer of an object that has a multiplexed method.
WRAPPER = "__serve_multiplex_wrapper"


class MultiplexedIds:
    """The ids that Ray reports for this replica, kept equal to what is in host memory."""

    def __init__(self, held: Callable[[], Collection[str]]) -> None:
        """Report nothing yet; `held` returns the keys of the adapters in host memory."""
        self._held = held

    # Without a limit: bytes decide what a replica holds, and they are the store's.
    @serve.multiplexed(max_num_models_per_replica=-1)
    async def _add(self, key: str) -> str:
        return key

    async def update(self) -> None:
        """Have Ray report what is held now: it tells its controller within a tenth of a second."""
        # Shielded: a caller who leaves in the middle would have Ray report an id that never came.
        await asyncio.shield(self._update())

    async def _update(self) -> None:
        add: Any = self._add
        for key in frozenset(self._held()) - self.reported():
            await add(key)
        wrapper: Any = getattr(self, WRAPPER, None)
        if wrapper is None:
            return
        held = frozenset(self._held())
        for key in [key for key in wrapper.models if key not in held]:
            # Ray unloads the least recently used one, and says nothing of it: it would only report the next load.
            wrapper.models.move_to_end(key, last=False)
            await wrapper.unload_model_lru()
            wrapper._push_multiplexed_replica_info = True

    def reported(self) -> frozenset[str]:
        """Return the ids that Ray knows of."""
        return frozenset(getattr(self, WRAPPER).models) if hasattr(self, WRAPPER) else frozenset()
