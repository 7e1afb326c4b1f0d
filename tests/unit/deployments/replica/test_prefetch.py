"""What a new replica makes ready, and within which bounds."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from serve_app.core import AdapterSpec
from serve_app.deployments.replica.prefetch import (
    HALF_LIFE_S,
    PopularAdapter,
    UsageTracker,
    WarmUpLimits,
    chosen,
    prefetch_adapters,
)
from serve_app.errors import HubUnavailable

LIMITS = WarmUpLimits(timeout_s=5.0, max_adapters=8, max_bytes=1000)


def spec(name: str, size_bytes: int = 10) -> AdapterSpec:
    return AdapterSpec(name, "base", "0" * 16, "file.safetensors", "folder", "nowhere", size_bytes)


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Shelf:
    """Where adapters are brought; some are gone, some never come."""

    def __init__(self, *told: Iterable[PopularAdapter], gone: str = "", endless: str = "") -> None:
        self._told = told
        self._gone = gone
        self._endless = endless
        self.brought: list[str] = []

    async def ask(self) -> Iterable[Iterable[PopularAdapter]]:
        return self._told

    async def bring(self, wanted: AdapterSpec) -> None:
        if wanted.id == self._gone:
            raise HubUnavailable(wanted.id, "it is down")
        if wanted.id == self._endless:
            await asyncio.Event().wait()
        self.brought.append(wanted.id)

    async def prefetch_adapters(self, limits: WarmUpLimits = LIMITS) -> int:
        return await prefetch_adapters(self.ask, self.bring, limits, clock=Clock())


def test_demand_names_the_adapters_used_most_first() -> None:
    demand = UsageTracker(Clock())
    for name in "abcbbc":
        demand.note(spec(name))
    assert [(each.spec.id, each.uses) for each in demand.most()] == [("b", 3), ("c", 2), ("a", 1)]


def test_demand_fades() -> None:
    clock = Clock()
    demand = UsageTracker(clock)
    for _ in range(3):
        demand.note(spec("old"))
    clock.now_s = 2 * HALF_LIFE_S
    demand.note(spec("new"))
    assert [(each.spec.id, each.uses) for each in demand.most()] == [("new", 1), ("old", 0.75)]


def test_demand_for_thousands_of_adapters_stays_small() -> None:
    demand = UsageTracker(Clock())
    for index in range(5000):
        demand.note(spec(f"adapter-{index}"))
        demand.note(spec("hot"))
    assert demand.most()[0].spec.id == "hot"
    assert len(demand.most()) <= 64


def test_what_all_replicas_use_is_added_up() -> None:
    told = [[PopularAdapter(spec("a"), 3.0), PopularAdapter(spec("b"), 2.0)], [PopularAdapter(spec("b"), 2.0)]]
    assert [each.id for each in chosen(told, max_adapters=5, max_bytes=1000)] == ["b", "a"]


def test_what_does_not_fit_is_left_out() -> None:
    told = [
        [
            PopularAdapter(spec("big", 600), 9.0),
            PopularAdapter(spec("bigger", 600), 8.0),
            PopularAdapter(spec("small", 300), 7.0),
        ]
    ]
    assert [each.id for each in chosen(told, max_adapters=5, max_bytes=1000)] == ["big", "small"]
    assert [each.id for each in chosen(told, max_adapters=1, max_bytes=1000)] == ["big"]


async def test_the_most_wanted_are_brought_and_one_that_fails_stops_nothing() -> None:
    shelf = Shelf(
        [PopularAdapter(spec("a"), 3.0), PopularAdapter(spec("gone"), 2.0), PopularAdapter(spec("b"), 1.0)], gone="gone"
    )
    assert await shelf.prefetch_adapters() == 2
    assert shelf.brought == ["a", "b"]


async def test_when_time_is_out_the_replica_starts_with_what_it_has() -> None:
    shelf = Shelf(
        [PopularAdapter(spec("a"), 3.0), PopularAdapter(spec("never"), 2.0), PopularAdapter(spec("b"), 1.0)],
        endless="never",
    )
    assert await shelf.prefetch_adapters(WarmUpLimits(timeout_s=0.05, max_adapters=8, max_bytes=1000)) == 1


async def test_siblings_that_hang_cost_no_more_than_the_asking_may_take() -> None:
    async def ask() -> Iterable[Iterable[PopularAdapter]]:
        await asyncio.Event().wait()
        return ()

    limits = WarmUpLimits(timeout_s=10_000.0, max_adapters=8, max_bytes=1000, ask_timeout_s=0.05)
    async with asyncio.timeout(60):
        assert await prefetch_adapters(ask, Shelf().bring, limits, clock=Clock()) == 0


async def test_a_replica_without_siblings_and_one_told_not_to_warm_up_start_at_once() -> None:
    assert await Shelf().prefetch_adapters() == 0
    shelf = Shelf([PopularAdapter(spec("a"), 3.0)])
    assert await shelf.prefetch_adapters(WarmUpLimits(timeout_s=0.0, max_adapters=8, max_bytes=1000)) == 0
    assert shelf.brought == []


async def test_a_question_that_fails_costs_no_start() -> None:
    async def ask() -> Iterable[Iterable[PopularAdapter]]:
        raise ConnectionError

    assert await prefetch_adapters(ask, Shelf().bring, LIMITS, clock=Clock()) == 0
