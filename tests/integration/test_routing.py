"""The router within Serve: replicas of one base, and processes that send to them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import ray
from ray import serve

from serve_app.config import AppConfig
from serve_app.engine.worker.scheduling import QueuePolicy
from serve_app.routing.router import router_config
from serve_app.work import LatencyModel
from tests.faults.breaking import until
from tests.replicas.sleeper import BASE, sleeping_request, sleeping_use
from tests.replicas.sleeping import SleepingReplica, Sleeps, Slept

STYLES = ("night", "sepia", "sketch")
WAIT_S = 120.0


@ray.remote(num_cpus=0)
class Caller:
    """A process with a router of its own, as every ingress replica is."""

    def __init__(self, app: str) -> None:
        self._handle = serve.get_deployment_handle("SleepingReplica", app)

    async def ask(self, style: str, number: int, steps: int = 1) -> Slept:
        use = sleeping_use(f"me/{style}")
        handle = self._handle.options(multiplexed_model_id=use.spec.key)
        return await handle.generate.remote(replace(sleeping_request(number, use), steps=steps))

    async def ask_at_once(self, asks: list[tuple[str, int]]) -> list[Slept]:
        return await asyncio.gather(*(self.ask(style, number) for style, number in asks))

    async def sees(self) -> dict[str, frozenset[str]]:
        """The keys that this process's router takes each replica to hold: Ray's record."""
        ours: Any = self._handle._router
        known = ours._asyncio_router.request_router.curr_replicas
        return {id_.unique_id: frozenset(replica.multiplexed_model_ids) for id_, replica in tuple(known.items())}

    async def held(self) -> dict[str, frozenset[str]]:
        """The keys that replicas have in memory."""
        return dict(await self._handle.broadcast("held").results_async())

    async def busy(self) -> list[str]:
        """The replicas that were sent or report more than a fetch of work."""
        ours: Any = self._handle._router
        views = ours._asyncio_router.request_router._states.views(time.monotonic())
        return [view.id for view in views if view.ahead_s > 1.0]

    async def forget(self, style: str) -> None:
        await self._handle.broadcast("forget", sleeping_use(f"me/{style}").spec.key).results_async()


def deploy(app: str, folder: Path) -> None:
    sleeps = Sleeps(
        LatencyModel(0.0, 0.02), swap_s=0.0, fetch_s=0.01, host_adapters=4, file_bytes=100,
        max_batch_images=1, policy=QueuePolicy(),
    )  # fmt: skip
    (folder / sleeping_use("me/any").spec.filename).write_bytes(b"0" * sleeps.file_bytes)
    config = AppConfig.model_validate({"bases": [{"id": BASE, "source": {"embedded": "demo/sd15"}}], "disk_cache": 0})
    deployment = SleepingReplica.options(
        num_replicas=3,
        ray_actor_options={"num_cpus": 0.1},
        request_router_config=router_config(config.bases[0]),
    )
    serve.run(deployment.bind(sleeps, folder), name=app, route_prefix=None)


@pytest.fixture(scope="module")
def caller(cluster: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One, of a base with three replicas that hold four adapters each."""
    deploy("three", tmp_path_factory.mktemp("files"))
    made = Caller.remote("three")
    yield made
    ray.kill(made)
    serve.delete("three")


def test_the_router_sees_what_replicas_hold_through_evictions_and_deletions(caller: Any) -> None:
    rng = Random(0)
    styles = [f"s{number}" for number in range(20)]
    for turn in range(12):
        asks = [(rng.choice(styles), turn * 10 + number) for number in range(10)]
        ray.get(caller.ask_at_once.remote(asks), timeout=WAIT_S)
        if turn % 3 == 2:
            ray.get(caller.forget.remote(rng.choice(styles)), timeout=WAIT_S)
        held = ray.get(caller.held.remote(), timeout=WAIT_S)
        assert all(len(keys) <= 4 for keys in held.values())
        until(lambda held=held: ray.get(caller.sees.remote(), timeout=WAIT_S) == held, "the router's view of each")
    for style in styles:
        ray.get(caller.forget.remote(style), timeout=WAIT_S)
    until(lambda: not any(ray.get(caller.sees.remote(), timeout=WAIT_S).values()), "a router that sees no adapter")


def test_of_three_idle_replicas_the_holder_gets_all_requests_until_it_has_more_work_than_a_fetch(caller: Any) -> None:
    holder = ray.get(caller.ask.remote("mine", 0), timeout=WAIT_S).replica
    until(lambda: any(ray.get(caller.sees.remote(), timeout=WAIT_S).values()), "word of the adapter")
    answers = [ray.get(caller.ask.remote("mine", number), timeout=WAIT_S) for number in range(1, 101)]
    assert [answer.replica for answer in answers] == [holder] * 100
    # Twenty seconds of work, by the replica's own measure, go there; the next request does not wait for it.
    busy = caller.ask.remote("mine", 101, 200)
    until(lambda: ray.get(caller.busy.remote(), timeout=WAIT_S) == [holder], "word of the long request")
    assert ray.get(caller.ask.remote("mine", 102), timeout=WAIT_S).replica != holder
    ray.get(busy, timeout=WAIT_S)


def test_adapters_stay_on_their_replica_whichever_ingress_sends_to_them(caller: Any) -> None:
    callers = [caller, Caller.remote("three")]
    first = [callers[number % 2].ask.remote(style, 0) for number, style in enumerate(STYLES)]
    answers = list(zip(STYLES, ray.get(first, timeout=WAIT_S), strict=True))
    # What one of them has had fetched, the other learns from Serve, which takes its time.
    keys = {sleeping_use(f"me/{style}").spec.key for style in STYLES}
    until(
        lambda: all(
            frozenset().union(*seen.values()) >= keys
            for seen in ray.get([caller.sees.remote() for caller in callers], timeout=WAIT_S)
        ),
        "word of every adapter at every router",
    )
    answers += [
        (style, ray.get(callers[(turn + number) % 2].ask.remote(style, turn), timeout=WAIT_S))
        for turn in range(1, 10)
        for number, style in enumerate(STYLES)
    ]
    ray.kill(callers[1])
    assert len({(style, slept.replica) for style, slept in answers}) == len(STYLES)
    assert sum(slept.fetches for _, slept in answers) == len(STYLES)
