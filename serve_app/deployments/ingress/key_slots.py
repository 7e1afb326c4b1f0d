"""The slots on a base's replicas that one key may take; what it sends beyond them waits here, in order.

Serve hands requests to its router in the order in which they came, a few at a time: a key with more requests than the
replicas have slots would keep all others' from being routed. Must not know Ray.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

from serve_app.core import GenerationRequest

# Of all slots of a base, those that one key's requests may have.
MOST_OF_SLOTS = 0.75
# Batch requests after others, then by arrival.
_Waiting = tuple[bool, float, int, asyncio.Future[None]]


class KeySlots:
    """The slots of one base for an ingress replica. Callers without a key have no limit. For one event loop."""

    def __init__(self, slots: Callable[[], float], clock: Callable[[], float]) -> None:
        """Start with nothing taken; `slots` says how many this ingress replica may count on."""
        self._slots = slots
        self._clock = clock
        self._taken: Counter[str] = Counter()
        self._waiting: dict[str, list[_Waiting]] = {}
        self._numbers = itertools.count()

    @asynccontextmanager
    async def slot(self, request: GenerationRequest) -> AsyncGenerator[None]:
        """Take a slot for the time of the block; wait for it where the request's key has as many as it may."""
        if not request.share:
            yield
            return
        await self._take(request)
        try:
            yield
        finally:
            self._taken -= Counter((request.share,))
            self._hand_on(request.share)

    async def _take(self, request: GenerationRequest) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        place = (request.priority == "batch", self._clock() - request.waited_s, next(self._numbers), turn)
        heapq.heappush(self._waiting.setdefault(request.share, []), place)
        self._hand_on(request.share)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it had its turn at this moment
                self._taken -= Counter((request.share,))
                self._hand_on(request.share)
            raise

    def _hand_on(self, share: str) -> None:
        """Give the slots that a key may take and has not taken to those of its requests that wait."""
        waiting = self._waiting.get(share, [])
        while waiting and self._taken[share] < math.ceil(MOST_OF_SLOTS * self._slots()):
            *_, turn = heapq.heappop(waiting)
            if not turn.done():
                self._taken[share] += 1
                turn.set_result(None)
        if not waiting:
            self._waiting.pop(share, None)
