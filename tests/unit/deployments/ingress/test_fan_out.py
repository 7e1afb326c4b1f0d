"""A request whose images are drawn in parts, with the replicas' part played by the test."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace

import pytest

from serve_app.core import (
    GenerationEvent,
    GenerationRequest,
    GenerationResult,
    PixelImage,
    Preview,
    Progress,
    Timings,
)
from serve_app.deployments.ingress.fan_out import FanOut
from serve_app.errors import QueueFull, ReplicaLost
from tests.engine_cases import request

LAST_SEED = 2**64 - 1


def image_of(seed: int) -> PixelImage:
    return PixelImage(1, 1, seed.to_bytes(8, "big")[-3:])


def result_of(part: GenerationRequest, *, denoise_ms: float = 1.0, warnings: tuple[str, ...] = ()) -> GenerationResult:
    seeds = tuple((part.seed + index) % 2**64 for index in range(part.num_images))
    return GenerationResult(
        part.request_id, part.base_id, tuple(map(image_of, seeds)), seeds, (), Timings(denoise_ms=denoise_ms),
        denoise_ms / 1e3, "cpu", part.num_images, warnings, denoise_ms / 1e3,
    )  # fmt: skip


class Replicas:
    """Answer each part when the test lets them; `told` holds what a part tells first, by its seed."""

    def __init__(self) -> None:
        self.asked: list[GenerationRequest] = []
        self.stopped: list[int] = []
        self.may_go: dict[int, asyncio.Event] = defaultdict(asyncio.Event)
        self.failures: dict[int, Exception] = {}
        self.told: dict[int, list[GenerationEvent]] = {}
        self.result: Callable[[GenerationRequest], GenerationResult] = result_of

    async def __call__(self, part: GenerationRequest) -> GenerationResult:
        async with aclosing(self.stream(part)) as events:
            async for event in events:
                if isinstance(event, GenerationResult):
                    return event
        raise AssertionError

    async def stream(self, part: GenerationRequest) -> AsyncGenerator[GenerationEvent]:
        self.asked.append(part)
        for event in self.told.get(part.seed, ()):
            yield event
        try:
            await self.may_go[part.seed].wait()
        except asyncio.CancelledError:
            self.stopped.append(part.seed)
            raise
        if part.seed in self.failures:
            raise self.failures[part.seed]
        yield self.result(part)

    def let_go(self, *seeds: int) -> None:
        for seed in seeds:
            self.may_go[seed].set()


def fan_out(replicas: Replicas, *counts: int) -> FanOut:
    async def count_parts(whole: GenerationRequest) -> tuple[int, ...]:
        return counts or (whole.num_images,)

    return FanOut(replicas, count_parts)


async def until_asked(replicas: Replicas, count: int) -> None:
    for _ in range(100):
        if len(replicas.asked) == count:
            return
        await asyncio.sleep(0)
    raise AssertionError(replicas.asked)


async def test_images_come_in_order_whichever_part_ends_first_with_the_seeds_of_the_whole() -> None:
    replicas, whole = Replicas(), request(seed=LAST_SEED, num_images=5)
    call = asyncio.ensure_future(fan_out(replicas, 2, 2, 1)(whole))
    await until_asked(replicas, 3)
    for seed in (3, 1, LAST_SEED):
        replicas.let_go(seed)
        await asyncio.sleep(0)
    result = await call
    assert result.seeds == (LAST_SEED, 0, 1, 2, 3)
    assert result.images == tuple(map(image_of, result.seeds))
    assert [(part.num_images, part.whole_images) for part in replicas.asked] == [(2, 5), (2, 5), (1, 5)]


async def test_times_are_those_of_the_slowest_part_and_device_time_is_that_of_all() -> None:
    replicas = Replicas()
    replicas.let_go(0, 1)
    replicas.result = lambda part: result_of(part, denoise_ms=100.0 * (part.seed + 1), warnings=("odd", f"{part.seed}"))
    result = await fan_out(replicas, 1, 1)(request(seed=0, num_images=2))
    assert result.timings == Timings(denoise_ms=200.0)
    assert (result.compute_s, result.device_s) == (pytest.approx(0.3), pytest.approx(0.3))
    assert result.warnings == ("odd", "0", "1")
    assert result.batch_size == 1


async def test_a_request_that_stays_whole_is_handed_on_as_it_is() -> None:
    replicas, whole = Replicas(), request(seed=1, num_images=3)
    replicas.let_go(1)
    await fan_out(replicas)(whole)
    assert replicas.asked == [whole]
    assert replicas.asked[0] is whole


@pytest.mark.parametrize("is_stream", [False, True])
async def test_where_one_part_is_refused_the_request_is_and_the_other_parts_stop(*, is_stream: bool) -> None:
    replicas, whole = Replicas(), request(seed=0, num_images=3)
    replicas.failures[1] = QueueFull("demo/sd15", 1)
    way = fan_out(replicas, 1, 1, 1)
    call = asyncio.ensure_future(anext(way.stream(whole)) if is_stream else way(whole))
    await until_asked(replicas, 3)
    replicas.let_go(1)
    with pytest.raises(QueueFull):
        await call
    assert sorted(replicas.stopped) == [0, 2]


async def test_a_caller_who_leaves_stops_every_part() -> None:
    replicas = Replicas()
    call = asyncio.ensure_future(fan_out(replicas, 1, 1)(request(seed=0, num_images=2)))
    await until_asked(replicas, 2)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert sorted(replicas.stopped) == [0, 1]


async def test_a_stream_tells_the_progress_of_the_part_furthest_behind_and_shows_each_image_as_its_own() -> None:
    replicas, whole = Replicas(), request(seed=0, num_images=3, steps=4, num_previews=1)
    replicas.told = {
        0: [Progress(2, 0, 4), Progress(0, 0, 4), Progress(0, 1, 4), Preview(0, 1, image_of(1))],
        2: [Progress(0, 0, 4), Progress(0, 3, 4), Preview(0, 0, image_of(2))],
    }
    events: list[GenerationEvent] = []
    async with aclosing(fan_out(replicas, 2, 1).stream(whole)) as stream:
        async for event in stream:
            events.append(event)
            if sum(isinstance(told, Preview) for told in events) == 2:
                replicas.let_go(0, 2)
    progress = [event for event in events if isinstance(event, Progress)]
    assert progress[0] == Progress(2, 0, 4)
    assert [one.step for one in progress] == sorted(one.step for one in progress)
    assert progress[-1].step in (1, 3)
    assert {(event.image_index, event.image) for event in events if isinstance(event, Preview)} == {
        (1, image_of(1)),
        (2, image_of(2)),
    }
    (result,) = [event for event in events if isinstance(event, GenerationResult)]
    assert events[-1] is result
    assert result.seeds == (0, 1, 2)


async def test_a_part_that_was_set_aside_shows_as_such_though_others_run() -> None:
    replicas, whole = Replicas(), request(seed=0, num_images=2, steps=4)
    replicas.told = {0: [Progress(1, 1, 4)], 1: [Progress(0, 2, 4)]}
    async with aclosing(fan_out(replicas, 1, 1).stream(whole)) as stream:
        told = [await anext(stream) for _ in range(2)]
    assert told[-1] == Progress(1, 1, 4)


async def test_a_part_that_is_lost_for_good_fails_the_request() -> None:
    replicas = Replicas()
    replicas.failures[1] = ReplicaLost("demo/sd15", attempts=3)
    replicas.let_go(0, 1)
    with pytest.raises(ReplicaLost):
        await fan_out(replicas, 1, 1)(request(seed=0, num_images=2))


def test_a_part_of_a_part_is_a_part_of_the_whole() -> None:
    whole = request(seed=5, num_images=8)
    assert whole.part(4, 4).part(2, 1) == replace(whole, seed=11, num_images=1, whole_images=8)
