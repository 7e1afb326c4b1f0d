"""A request for several images as parts on several replicas: the images in order, the progress of all in one stream.

Owns the cut and the merge; where the parts go is the router's choice, and a part that is lost is sent again by the
dispatcher as any request is. Must not know Ray.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import fields, replace
from itertools import accumulate
from typing import Any

from serve_app.core import GenerationEvent, GenerationRequest, GenerationResult, Preview, Progress, Starting, Timings
from serve_app.deployments.ingress.dispatch import Dispatch

# Returns how many images each part of a request has; one number for a request that stays whole.
CountParts = Callable[[GenerationRequest], Awaitable[Sequence[int]]]


class FanOut:
    """The way to the replicas for requests of any number of images. A request is answered whole or not at all."""

    def __init__(self, dispatch: Dispatch, count_parts: CountParts) -> None:
        self._dispatch = dispatch
        self._count_parts = count_parts

    async def __call__(self, request: GenerationRequest) -> GenerationResult:
        """Return the result of one request.

        Raises:
            LoraplexError: the error of a part; the other parts are stopped then.
        """
        parts = await self._parts(request)
        calls = [asyncio.ensure_future(self._dispatch(part)) for part in parts]
        try:
            return merge_results(await asyncio.gather(*calls))
        finally:
            await _stop(calls)

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent]:
        """Yield the events of one request.

        Raises:
            LoraplexError: the error of a part; the other parts are stopped then.
        """
        parts = await self._parts(request)
        told: asyncio.Queue[tuple[int, GenerationEvent] | asyncio.Future[None]] = asyncio.Queue()

        async def read(index: int, part: GenerationRequest) -> None:
            async with aclosing(self._dispatch.stream(part)) as events:
                async for event in events:
                    told.put_nowait((index, event))

        merged = MergedEvents(parts)
        readers = [asyncio.ensure_future(read(index, part)) for index, part in enumerate(parts)]
        for reader in readers:
            reader.add_done_callback(told.put_nowait)
        try:
            while not merged.is_complete:
                item = await told.get()
                if isinstance(item, asyncio.Future):
                    item.result()
                elif (event := merged.take(*item)) is not None:
                    yield event
        finally:
            await _stop(readers)

    async def _parts(self, request: GenerationRequest) -> list[GenerationRequest]:
        counts = await self._count_parts(request) if request.num_images > 1 else (1,)
        firsts = accumulate(counts, initial=0)
        return [request.part(first, count) for first, count in zip(firsts, counts, strict=False)]


class MergedEvents:
    """The events of a request's parts, as if it were whole: its progress is that of the part furthest behind."""

    def __init__(self, parts: Sequence[GenerationRequest]) -> None:
        self._progress = [Progress(0, 0, part.planned_steps) for part in parts]
        self._firsts = list(accumulate((part.num_images for part in parts), initial=0))
        self._results: list[GenerationResult | None] = [None] * len(parts)
        self._last: Progress | None = None

    @property
    def is_complete(self) -> bool:
        """Whether every part has its images."""
        return None not in self._results

    def take(self, index: int, event: GenerationEvent) -> GenerationEvent | None:
        """Return what an event of one part is for the whole; None for nothing new."""
        if isinstance(event, Preview):
            return replace(event, image_index=self._firsts[index] + event.image_index)
        if isinstance(event, Progress):
            self._progress[index] = event
            return self._furthest_behind()
        if isinstance(event, Starting):
            return event if index == 0 else None  # all parts wait for the same base
        if not isinstance(event, GenerationResult):
            return event
        self._results[index] = event
        steps = self._progress[index].steps
        self._progress[index] = Progress(0, steps, steps)
        results = [result for result in self._results if result is not None]
        return merge_results(results) if self.is_complete else self._furthest_behind()

    def _furthest_behind(self) -> Progress | None:
        now = min(self._progress, key=lambda one: (one.step, -one.queue_position))
        if now == self._last:
            return None
        self._last = now
        return now


def merge_results(results: Sequence[GenerationResult]) -> GenerationResult:
    """Return the result of a whole request; its times are those of the part that took longest."""
    if len(results) == 1:
        return results[0]
    return replace(
        max(results, key=lambda result: _total_ms(result.timings)),
        images=tuple(image for result in results for image in result.images),
        seeds=tuple(seed for result in results for seed in result.seeds),
        compute_s=sum(result.compute_s for result in results),
        device_s=sum(result.device_s for result in results),
        device=", ".join(dict.fromkeys(result.device for result in results)),
        batch_size=max(result.batch_size for result in results),
        warnings=tuple(dict.fromkeys(warning for result in results for warning in result.warnings)),
    )


def _total_ms(timings: Timings) -> float:
    return sum(getattr(timings, field.name) for field in fields(timings))


async def _stop(tasks: Sequence[asyncio.Future[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
