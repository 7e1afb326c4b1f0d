"""What a new replica loads, and within which bounds."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from serve_app.core import AdapterSpec
from serve_app.deployments.replica.prefetch import fitting, prefetch_adapters
from serve_app.errors import HubUnavailable
from serve_app.settings import ReplicaSettings

LIMITS = ReplicaSettings(warm_up_timeout_s=5.0, max_warm_up_adapters=8, warm_up_size=1000)  # type: ignore[arg-type]


def spec(name: str, size_bytes: int = 10) -> AdapterSpec:
    return AdapterSpec(name, "base", "0" * 16, "file.safetensors", "folder", "nowhere", size_bytes)


class Source:
    """Where adapters are loaded from; some are gone, some never come."""

    def __init__(self, *popular: str, gone: str = "", endless: str = "") -> None:
        self._popular = [spec(name) for name in popular]
        self._gone = gone
        self._endless = endless
        self.loaded: list[str] = []

    async def popular(self) -> Sequence[AdapterSpec]:
        return self._popular

    async def load(self, wanted: AdapterSpec) -> None:
        if wanted.id == self._gone:
            raise HubUnavailable(wanted.id, "it is down")
        if wanted.id == self._endless:
            await asyncio.Event().wait()
        self.loaded.append(wanted.id)

    async def prefetch(self, limits: ReplicaSettings = LIMITS) -> int:
        return await prefetch_adapters(self.popular, self.load, limits)


def test_what_does_not_fit_is_left_out() -> None:
    specs = [spec("big", 600), spec("bigger", 600), spec("small", 300)]
    assert [each.id for each in fitting(specs, LIMITS)] == ["big", "small"]
    assert [each.id for each in fitting(specs, LIMITS.model_copy(update={"max_warm_up_adapters": 1}))] == ["big"]
    assert [each.id for each in fitting(specs, LIMITS.model_copy(update={"host_cache": 500}))] == ["small"]


async def test_the_most_used_are_loaded_and_one_that_fails_stops_nothing() -> None:
    source = Source("a", "gone", "b", gone="gone")
    assert await source.prefetch() == 2
    assert source.loaded == ["a", "b"]


async def test_when_time_is_out_the_replica_starts_with_what_it_has() -> None:
    source = Source("a", "never", "b", endless="never")
    assert await source.prefetch(LIMITS.model_copy(update={"warm_up_timeout_s": 0.05})) == 1


async def test_a_keeper_that_hangs_costs_no_more_than_a_warm_up_may_take() -> None:
    async def popular() -> Sequence[AdapterSpec]:
        await asyncio.Event().wait()
        return ()

    limits = LIMITS.model_copy(update={"warm_up_timeout_s": 0.05})
    assert await prefetch_adapters(popular, Source().load, limits) == 0


async def test_a_replica_that_is_not_to_warm_up_starts_at_once() -> None:
    source = Source("a")
    assert await source.prefetch(LIMITS.model_copy(update={"warm_up_timeout_s": 0.0})) == 0
    assert source.loaded == []


async def test_a_question_that_fails_costs_no_start() -> None:
    async def popular() -> Sequence[AdapterSpec]:
        raise ConnectionError

    assert await prefetch_adapters(popular, Source().load, LIMITS) == 0
