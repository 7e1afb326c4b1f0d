"""The shell alone, with Serve's own request types; `tests/integration/test_routing.py` runs it within Serve."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve.request_router import PendingRequest

from serve_app.app import build
from serve_app.config import AppConfig
from serve_app.core import AdapterSpec, GenerationRequest, ScaledAdapter
from serve_app.routing.recorder import DeviceLoad, RoutingStatsCollector, Tiers
from serve_app.routing.router import TURN_AFTER_S, PredictedFinishRouter
from serve_app.work import LatencyModel

BASE = "demo/sd15"
DEPLOYMENT = DeploymentID(name="base-demo--sd15", app_name="loraplex")
SPECS = {name: AdapterSpec(f"acme/{name}", BASE, "1" * 16, "a.safetensors", "folder", "", 10**8) for name in "ab"}


@dataclass
class Replica:
    """What the router reads of Serve's wrapper of a replica."""

    name: str
    routing_stats: dict[str, Any] = field(default_factory=dict[str, Any])
    multiplexed_model_ids: frozenset[str] = frozenset()
    node_id: str = "node"

    @property
    def replica_id(self) -> ReplicaID:
        return ReplicaID(unique_id=self.name, deployment_id=DEPLOYMENT)

    def tells(self, *held: str, backlog_s: float = 0.0) -> Replica:
        recorder = RoutingStatsCollector(wall_clock=time.time, clock=time.monotonic)
        load = DeviceLoad(backlog_s, LatencyModel(0.5, 0.1), progress=0.0, is_busy=False)
        self.routing_stats = recorder.snapshot(load, Tiers([SPECS[name].key for name in held], host_free_bytes=1e9))
        return self


@dataclass
class Taking(Replica):
    """A replica that takes two requests at a time."""

    ongoing: int = 0
    max_ongoing_requests: int = 2

    def push_proxy_handle(self, handle: Any) -> None:
        """Take what Serve hands to every replica."""

    async def get_queue_len(self, *, deadline_s: float) -> int:
        return self.ongoing


def generation(number: int, *adapters: str) -> GenerationRequest:
    uses = tuple(ScaledAdapter(SPECS[name], 1.0) for name in adapters)
    return GenerationRequest(f"r{number}", BASE, "a house", None, uses, 512, 512, 30, 7.5, None, number)


async def pending(*arguments: Any, number: int = 0, model_id: str = "") -> PendingRequest:
    metadata = RequestMetadata(request_id=f"r{number}", internal_request_id=f"i{number}", multiplexed_model_id=model_id)
    return PendingRequest(args=list(arguments), kwargs={}, metadata=metadata)


@pytest.fixture
async def router() -> PredictedFinishRouter:
    router = PredictedFinishRouter(DEPLOYMENT, DeploymentHandleSource.REPLICA)
    router.initialize_state(base_id=BASE, disk_bytes=0, stale_after_s=15.0)
    return router


async def order(router: PredictedFinishRouter, replicas: list[Any], request: PendingRequest | None) -> list[str]:
    ranks = await router.choose_replicas(replicas, request)
    assert all(len(rank) == 1 for rank in ranks)
    return [rank[0].replica_id.unique_id for rank in ranks]


async def test_the_replica_that_holds_the_adapter_comes_first_and_all_others_after_it(
    router: PredictedFinishRouter,
) -> None:
    replicas = [Replica("r0").tells(), Replica("r1").tells("a"), Replica("r2").tells("b")]
    request = await pending(generation(0, "a"))
    found = await order(router, replicas, request)
    assert found[0] == "r1"
    assert sorted(found) == ["r0", "r1", "r2"]
    assert request.routing_context.should_backoff


async def test_requests_of_one_burst_spread_before_any_replica_has_told_of_them(router: PredictedFinishRouter) -> None:
    replicas = [Replica(f"r{index}").tells("a") for index in range(3)]
    firsts = [(await order(router, replicas, await pending(generation(i, "a"), number=i)))[0] for i in range(6)]
    assert sorted(firsts[:3]) == ["r0", "r1", "r2"]
    assert sorted(firsts[3:]) == ["r0", "r1", "r2"]


async def test_a_request_counts_where_it_was_taken_even_if_that_was_not_the_first_choice(
    router: PredictedFinishRouter,
) -> None:
    replicas = [Replica("r0").tells("a"), Replica("r1").tells()]
    request = await pending(generation(0, "a"))
    assert await order(router, replicas, request) == ["r0", "r1"]
    router.on_request_routed(request, replicas[1].replica_id, None)
    assert (await order(router, replicas, await pending(generation(1), number=1)))[0] == "r0"


async def test_a_finished_request_frees_its_replica(router: PredictedFinishRouter) -> None:
    replicas = [Replica("r0").tells("a"), Replica("r1").tells()]
    for number in range(3):
        request = await pending(generation(number, "a"), number=number)
        assert (await order(router, replicas, request))[0] == "r0"
        router.on_request_routed(request, replicas[0].replica_id, None)
        router.on_request_completed(replicas[0].replica_id, f"i{number}")


@pytest.mark.parametrize("arguments", [(), ("checksum",), (None,), (object(), 3)])
async def test_calls_that_are_no_generations_are_routed_and_count_for_nothing(
    router: PredictedFinishRouter, arguments: tuple[Any, ...]
) -> None:
    replicas = [Replica("r0").tells(backlog_s=5.0), Replica("r1").tells()]
    for number in range(3):
        assert (await order(router, replicas, await pending(*arguments, number=number)))[0] == "r1"
    assert (await order(router, replicas, None))[0] == "r1"


async def test_a_model_id_alone_is_enough_to_find_who_holds_it(router: PredictedFinishRouter) -> None:
    replicas = [Replica("r0").tells(), Replica("r1").tells("a")]
    assert (await order(router, replicas, await pending(model_id=SPECS["a"].key)))[0] == "r1"


async def test_without_replicas_there_is_nothing_to_choose(router: PredictedFinishRouter) -> None:
    assert await order(router, [], await pending(generation(0))) == []


async def test_those_who_wait_for_a_place_get_it_in_their_order(router: PredictedFinishRouter) -> None:
    replicas = [Taking(name, ongoing=2).tells() for name in ("r0", "r1")]
    router.update_replicas(replicas)  # type: ignore[arg-type]
    router.max_backoff_s = 0.02  # the more often all of them ask, the sooner a later one meets a place by chance
    placed: list[int] = []

    async def send(number: int) -> None:
        request = await pending(generation(number, "a"), number=number)
        request.created_at -= 100 * TURN_AFTER_S  # it has waited, however late its task gets its turn
        replica: Any = await router._choose_replica_for_request(request)
        replica.ongoing += 1
        placed.append(number)

    calls = {asyncio.create_task(send(number)) for number in range(16)}
    await asyncio.sleep(TURN_AFTER_S)  # whoever comes at the same time as a place has not waited for it
    while calls:
        replicas[len(calls) % 2].ongoing = 1
        _, calls = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
    assert placed == list(range(16))


async def test_while_nobody_waits_a_place_goes_to_the_request_that_it_was_chosen_for(
    router: PredictedFinishRouter,
) -> None:
    replicas = [Taking("r0").tells("a"), Taking("r1").tells("b")]
    router.update_replicas(replicas)  # type: ignore[arg-type]
    requests = [await pending(generation(number, name), number=number) for number, name in enumerate("ab" * 2)]
    chosen: list[Any] = await asyncio.gather(*map(router._choose_replica_for_request, requests))
    assert [replica.name for replica in chosen] == ["r0", "r1", "r0", "r1"]


def routed_by(router: Any) -> str:
    base = {"id": BASE, "source": {"embedded": BASE}, "router": router}
    application = build(AppConfig.model_validate({"bases": [base]}))
    handles = application._bound_deployment.init_args[2]
    chosen = handles[BASE]._bound_deployment._deployment_config.request_router_config.request_router_class
    return str(chosen)


def test_ours_is_the_router_of_every_base_and_rays_own_is_a_choice() -> None:
    assert "PredictedFinishRouter" in routed_by({})
    assert "PredictedFinishRouter" in routed_by("loraplex")
    for ray in ("ray", {"policy": "ray"}):
        assert "PowerOfTwoChoicesRequestRouter" in routed_by(ray)


def test_an_unknown_router_is_refused() -> None:
    with pytest.raises(ValueError, match="loraplex"):
        routed_by("random")
