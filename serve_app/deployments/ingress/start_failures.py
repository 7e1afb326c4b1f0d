"""Bases whose replicas do not start: their callers are told why at once, and do not wait for a replica.

Owns when Serve is asked and who hears of a failure. Must not know what is waited for.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Mapping
from typing import TypeVar

from serve_app.deployments.registry.replica_counts import ReplicaCount
from serve_app.errors import BaseUnusable

T = TypeVar("T")
POLL_S = 1.0
# A base that ran so lately is not asked about.
RUNNING_TTL_S = 10.0


class StartFailures:
    """Serve's status of bases without a running replica, asked for while a request waits for one."""

    def __init__(
        self, counts: Callable[[], Awaitable[Mapping[str, ReplicaCount]]], *, clock: Callable[[], float]
    ) -> None:
        """`counts` returns the replicas of each base; `clock` is in monotonic seconds."""
        self._counts = counts
        self._clock = clock
        self._ran_at: dict[str, float] = {}

    async def unless_unusable(self, base: str, work: Awaitable[T]) -> T:
        """Return what comes of `work`, which a replica of the base does once one runs.

        Raises:
            BaseUnusable: none runs, and the last that was started said that none can.
        """
        if self._clock() - self._ran_at.get(base, float("-inf")) < RUNNING_TTL_S:
            return await work
        waited, failure = asyncio.ensure_future(_result(work)), asyncio.create_task(self._failure(base))
        try:
            await asyncio.wait({waited, failure}, return_when=asyncio.FIRST_COMPLETED)
            if not waited.done() and (reason := failure.result()) is not None:
                raise BaseUnusable(base, reason)
            return await waited
        finally:
            for task in (waited, failure):
                task.cancel()
            await asyncio.gather(waited, failure, return_exceptions=True)

    async def watched(self, base: str, events: AsyncIterable[T]) -> AsyncGenerator[T]:
        """Yield events; the first is waited for as `unless_unusable` does."""
        iterator = aiter(events)
        try:
            yield await self.unless_unusable(base, anext(iterator))
        except StopAsyncIteration:
            return
        async for event in iterator:
            yield event

    async def _failure(self, base: str) -> str | None:
        """Return why a base does not start as soon as that is known, None once a replica of it runs."""
        while True:
            count = (await self._counts()).get(base, ReplicaCount())
            if count.running:
                self._ran_at[base] = self._clock()
                return None
            if count.failure is not None:
                return count.failure
            await asyncio.sleep(POLL_S)


async def _result(work: Awaitable[T]) -> T:
    return await work
