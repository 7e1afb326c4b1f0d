"""The router within Serve: two replicas of one base, and two processes that send to them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import serve

from serve_app.config import AppConfig
from serve_app.engine.worker.scheduling import QueuePolicy
from serve_app.routing.router import router_config
from serve_app.routing.stats import decode, tag_of
from serve_app.work import LatencyModel
from tests.engine_cases import use_of
from tests.faults.breaking import until
from tests.replicas.sleeper import BASE as ASLEEP_BASE
from tests.replicas.sleeper import sleeping_request
from tests.replicas.sleeping import SleepingReplica, Sleeps, Slept
from tests.service import Service, base_settings

APPLICATION, ASLEEP = "routing", "asleep"
BASE = "demo/sd15"
STYLES = ("night", "sepia", "sketch", "stripes")
WAIT_S = 120.0


@pytest.fixture(scope="module")
def two_replicas(cluster: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    from serve_app.app import build

    config = AppConfig.model_validate(
        {
            "bases": [base_settings(BASE, autoscaling={"min_replicas": 2, "max_replicas": 2})],
            "adapters": {"embedded": True, "hub": {"enabled": False}},
            "ingress": {"replicas": 2, "num_cpus": 0.1},
            "cache_dir": str(tmp_path_factory.mktemp("cache")),
        }
    )
    serve.run(build(config), name=APPLICATION, route_prefix=f"/{APPLICATION}")
    yield Service(f"http://127.0.0.1:{cluster}/{APPLICATION}")
    serve.delete(APPLICATION)


def residents() -> list[frozenset[str]]:
    """The adapters in host memory, replica by replica, as they tell the routers."""
    handle = serve.get_deployment_handle("base-demo--sd15", APPLICATION)
    stats = [decode(told) for told in handle.broadcast("record_routing_stats").results()]
    assert len(stats) == 2
    return [told.host for told in stats if told is not None]


@ray.remote(num_cpus=0)
class Caller:
    """A process with a router of its own, as every ingress replica is."""

    def __init__(self) -> None:
        self._handle = serve.get_deployment_handle("SleepingReplica", ASLEEP)

    async def ask(self, style: str, number: int) -> Slept:
        use = use_of(f"me/{style}")
        handle = self._handle.options(multiplexed_model_id=use.spec.key)
        return await handle.generate.remote(sleeping_request(number, use))

    async def knows(self, style: str) -> bool:
        """Whether this process has heard that a replica holds an adapter, and how long that took to fetch."""
        ours: Any = self._handle._router
        known, tag = ours._asyncio_router.request_router.curr_replicas, tag_of(use_of(f"me/{style}").spec.key)
        told = [decode(replica.routing_stats) for replica in tuple(known.values())]
        return any(stats is not None and tag in stats.host and stats.measured.fetch > 1 for stats in told)


@pytest.fixture
def callers(cluster: int, tmp_path: Path) -> Iterator[list[Any]]:
    """Two, of a base with two replicas where a fetch takes far longer than an image.

    So it does than an image for which the machine took its time, by which a replica measures its pace.
    """
    (tmp_path / use_of("me/any").spec.filename).write_bytes(b"0" * 100)
    sleeps = Sleeps(
        LatencyModel(0.05, 0.0), swap_s=0.0, fetch_s=8.0, host_adapters=16, file_bytes=100, max_batch_images=1,
        policy=QueuePolicy(),
    )  # fmt: skip
    config = AppConfig.model_validate({"bases": [{"id": ASLEEP_BASE, "source": {"embedded": BASE}}], "disk_cache": 0})
    deployment = SleepingReplica.options(
        num_replicas=2,
        ray_actor_options={"num_cpus": 0.1},
        request_router_config=router_config(config.bases[0], config),
    )
    serve.run(deployment.bind(sleeps, tmp_path), name=ASLEEP, route_prefix=None)
    made = [Caller.remote() for _ in range(2)]
    yield made
    for caller in made:
        ray.kill(caller)
    serve.delete(ASLEEP)


def test_adapters_stay_on_their_replica_whichever_ingress_sends_to_them(callers: list[Any]) -> None:
    first = [callers[number % 2].ask.remote(style, 0) for number, style in enumerate(STYLES)]
    answers = list(zip(STYLES, ray.get(first, timeout=WAIT_S), strict=True))
    # What one of them has had fetched, the other learns from Serve, which takes its time.
    until(
        lambda: all(ray.get([caller.knows.remote(style) for caller in callers for style in STYLES], timeout=WAIT_S)),
        "word of every adapter at every router",
    )
    answers += [
        (style, ray.get(callers[(turn + number) % 2].ask.remote(style, turn), timeout=WAIT_S))
        for turn in range(1, 10)
        for number, style in enumerate(STYLES)
    ]
    assert len({(style, slept.replica) for style, slept in answers}) == len(STYLES)
    assert sum(slept.fetches for _, slept in answers) == len(STYLES)


def test_a_burst_for_one_adapter_spills_over_to_replicas_without_it(two_replicas: Service) -> None:
    for style in STYLES:
        two_replicas.draw("a red circle", model=f"demo/sd15-{style}", seed=0, num_inference_steps=2)
    assert len(frozenset.union(*residents())) == len(STYLES)

    # Serve's own multiplexed router would wait for the one replica that holds it: it takes 16 requests at once.
    with ThreadPoolExecutor(10) as callers:
        burst = [
            callers.submit(
                two_replicas.draw, "a red circle", model="demo/sd15-night", seed=seed, num_inference_steps=40
            )
            for seed in range(10)
        ]
        for call in burst:
            call.result()
    assert len(frozenset.intersection(*residents())) >= 1
