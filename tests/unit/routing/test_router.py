"""The shell alone, with Serve's own request types; `tests/integration/test_routing.py` runs it within Serve."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve.request_router import PendingRequest

from serve_app.app import base as deployed
from serve_app.config import BaseArguments
from serve_app.core import GenerationRequest, Priority
from serve_app.routing.known import known_replicas, on_joined, replicas_known
from serve_app.routing.router import MAX_ASKING, MAX_RANKED, LeastWorkRouter, by_turns
from serve_app.routing.stats import RoutingStatsCollector
from tests.routing_cases import BASE, device, generation, key

DEPLOYMENT = DeploymentID(name="base-demo--sd15", app_name="loraplex")


@dataclass
class Replica:
    """What the router reads of Serve's wrapper of a replica."""

    name: str
    routing_stats: dict[str, Any] = field(default_factory=dict[str, Any])
    multiplexed_model_ids: frozenset[str] = frozenset()
    max_ongoing_requests: int = 2

    @property
    def replica_id(self) -> ReplicaID:
        return ReplicaID(unique_id=self.name, deployment_id=DEPLOYMENT)

    def tells(self, *held: str, backlog_s: float = 0.0) -> Replica:
        self.routing_stats = RoutingStatsCollector(clock=lambda: 0.0).snapshot(device(backlog_s))
        self.multiplexed_model_ids = frozenset(map(key, held))
        return self


@dataclass
class Taking(Replica):
    """A replica that takes two requests at a time."""

    ongoing: int = 0
    probes: int = 0

    def push_proxy_handle(self, handle: Any) -> None:
        """Take what Serve hands to every replica."""

    async def get_queue_len(self, *, deadline_s: float) -> int:
        self.probes += 1
        return self.ongoing


async def pending(*arguments: Any, number: int = 0, model_id: str = "") -> PendingRequest:
    metadata = RequestMetadata(request_id=f"r{number}", internal_request_id=f"i{number}", multiplexed_model_id=model_id)
    return PendingRequest(args=list(arguments), kwargs={}, metadata=metadata)


@pytest.fixture
async def router() -> LeastWorkRouter:
    router = LeastWorkRouter(DEPLOYMENT, DeploymentHandleSource.REPLICA)
    router.initialize_state(base_id=BASE, stale_after_s=15.0)
    return router


async def order(router: LeastWorkRouter, replicas: list[Any], request: PendingRequest | None) -> list[str]:
    ranks = await router.choose_replicas(replicas, request)
    assert all(len(rank) == 1 for rank in ranks)
    return [rank[0].replica_id.unique_id for rank in ranks]


async def test_the_replica_that_holds_the_adapter_comes_first_by_rays_record(router: LeastWorkRouter) -> None:
    replicas = [Replica("r0").tells(), Replica("r1").tells("a"), Replica("r2").tells("b")]
    request = await pending(generation(0, "a"))
    assert (await order(router, replicas, request))[0] == "r1"
    assert request.routing_context.should_backoff


async def test_an_id_that_was_withdrawn_no_longer_decides(router: LeastWorkRouter) -> None:
    replicas = [Replica("r0").tells(backlog_s=1.0), Replica("r1").tells("a", backlog_s=1.5)]
    assert (await order(router, replicas, await pending(generation(0, "a"))))[0] == "r1"
    replicas[1].multiplexed_model_ids = frozenset()
    router.on_request_completed(replicas[1].replica_id, "i0")
    assert (await order(router, replicas, await pending(generation(1, "a"), number=1)))[0] == "r0"


async def test_only_a_few_replicas_are_ranked(router: LeastWorkRouter) -> None:
    replicas = [Replica(f"r{index}").tells(backlog_s=index) for index in range(100)]
    assert await order(router, replicas, await pending(generation(0))) == ["r0", "r1"]
    assert MAX_RANKED == 2


async def test_a_replica_known_to_be_full_is_asked_on_the_side_and_the_next_best_takes_the_request(
    router: LeastWorkRouter,
) -> None:
    replicas: list[Any] = [Replica(f"r{index}").tells(backlog_s=index) for index in range(4)]
    router.replica_queue_len_cache.update(replicas[0].replica_id, 2)
    ranks = await router.choose_replicas(replicas, await pending(generation(0)))
    assert [[replica.name for replica in rank] for rank in ranks] == [["r1", "r0"], ["r2"]]


async def test_requests_of_one_burst_spread_before_any_replica_has_told_of_them(router: LeastWorkRouter) -> None:
    replicas = [Replica(f"r{index}").tells("a") for index in range(3)]
    firsts = [(await order(router, replicas, await pending(generation(i, "a"), number=i)))[0] for i in range(6)]
    assert sorted(firsts[:3]) == ["r0", "r1", "r2"]
    assert sorted(firsts[3:]) == ["r0", "r1", "r2"]


async def test_a_request_counts_where_it_was_taken_even_if_that_was_not_the_first_choice(
    router: LeastWorkRouter,
) -> None:
    replicas = [Replica("r0").tells("a"), Replica("r1").tells()]
    request = await pending(generation(0, "a"))
    assert await order(router, replicas, request) == ["r0", "r1"]
    router.on_request_routed(request, replicas[1].replica_id, None)
    assert (await order(router, replicas, await pending(generation(1), number=1)))[0] == "r0"


async def test_the_parts_of_a_request_count_apart_though_serve_gives_them_one_id(router: LeastWorkRouter) -> None:
    replicas = [Replica("r0").tells(), Replica("r1").tells()]
    whole = replace(generation(0), num_images=2)
    parts = [await pending(whole.part(index, 1)) for index in range(2)]
    assert {(await order(router, replicas, part))[0] for part in parts} == {"r0", "r1"}


async def test_a_finished_request_frees_its_replica(router: LeastWorkRouter) -> None:
    replicas = [Replica("r0").tells("a"), Replica("r1").tells()]
    for number in range(3):
        request = await pending(generation(number, "a"), number=number)
        assert (await order(router, replicas, request))[0] == "r0"
        router.on_request_routed(request, replicas[0].replica_id, None)
        router.on_request_completed(replicas[0].replica_id, f"i{number}")


@pytest.mark.parametrize("arguments", [(), ("checksum",), (None,), (object(), 3)])
async def test_calls_that_are_no_generations_are_routed_and_count_for_nothing(
    router: LeastWorkRouter, arguments: tuple[Any, ...]
) -> None:
    replicas = [Replica("r0").tells(backlog_s=5.0), Replica("r1").tells()]
    for number in range(3):
        assert (await order(router, replicas, await pending(*arguments, number=number)))[0] == "r1"
    assert (await order(router, replicas, None))[0] == "r1"


async def test_a_model_id_alone_is_enough_to_find_who_holds_it(router: LeastWorkRouter) -> None:
    replicas = [Replica("r0").tells(), Replica("r1").tells("a")]
    assert (await order(router, replicas, await pending(model_id=key("a"))))[0] == "r1"


async def test_without_replicas_there_is_nothing_to_choose(router: LeastWorkRouter) -> None:
    assert await order(router, [], await pending(generation(0))) == []


async def test_those_who_wait_for_a_place_get_it_in_their_order(router: LeastWorkRouter) -> None:
    replicas = [Taking(name, ongoing=2).tells() for name in ("r0", "r1")]
    router.update_replicas(replicas)  # type: ignore[arg-type]
    router.max_backoff_s = 0.02
    placed: list[int] = []

    async def send(number: int) -> None:
        request = await pending(generation(number, "a"), number=number, model_id=key("a"))
        replica: Any = await router._choose_replica_for_request(request)
        replica.ongoing += 1
        placed.append(number)

    calls = {asyncio.create_task(send(number)) for number in range(16)}
    while calls:
        replicas[len(calls) % 2].ongoing = 1
        _, calls = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
    assert placed == list(range(16))


async def test_a_request_is_not_overtaken_by_more_than_the_few_that_ask_with_it(router: LeastWorkRouter) -> None:
    replicas = [Taking("r0", ongoing=2).tells()]
    router.update_replicas(replicas)  # type: ignore[arg-type]
    # Each for an adapter of its own, so that no place is handed on to another request.
    requests = [await pending(generation(number), number=number, model_id=f"m{number}") for number in range(40)]
    for number, request in enumerate(requests):
        request.created_at = float(number)
    asked = [bool(await router.choose_replicas(replicas, request)) for request in requests]  # type: ignore[arg-type]
    assert asked == [True] * MAX_ASKING + [False] * (40 - MAX_ASKING)
    for request in requests[:3]:
        request.future.cancel()
    asked = [bool(await router.choose_replicas(replicas, request)) for request in requests[3:]]  # type: ignore[arg-type]
    assert asked == [True] * MAX_ASKING + [False] * (37 - MAX_ASKING)


async def test_a_hundred_full_replicas_are_asked_no_more_often_than_by_serves_own_router(
    router: LeastWorkRouter,
) -> None:
    replicas = [Taking(f"r{index}", ongoing=2).tells(backlog_s=30.0 + index) for index in range(100)]
    router.update_replicas(replicas)  # type: ignore[arg-type]
    requests = [await pending(generation(number), number=number) for number in range(40)]
    probes: list[int] = []
    for _ in range(3):
        # One turn of all that wait: what Serve asks is what it is given, two replicas a request by its own router.
        ranks = [await router.choose_replicas(replicas, request) for request in requests]  # type: ignore[arg-type]
        probes.append(sum(len(rank) for given in ranks for rank in given))
    assert max(probes) <= MAX_ASKING * MAX_RANKED < 2 * 40


def routed_by(router: Any) -> str:
    base = {"id": BASE, "source": {"embedded": BASE}, "router": router}
    application = deployed(BaseArguments.model_validate({"base": base}))
    chosen = application._bound_deployment._deployment_config.request_router_config.request_router_class
    return str(chosen)


def test_ours_is_the_router_of_every_base_and_rays_own_is_a_choice() -> None:
    assert "LeastWorkRouter" in routed_by({})
    assert "LeastWorkRouter" in routed_by("loraplex")
    for ray in ("ray", {"policy": "ray"}):
        assert "PowerOfTwoChoicesRequestRouter" in routed_by(ray)


def test_an_unknown_router_is_refused() -> None:
    with pytest.raises(ValueError, match="loraplex"):
        routed_by("random")


async def test_the_gateway_is_told_what_the_router_of_its_process_knows(router: LeastWorkRouter) -> None:
    assert await known_replicas("demo/unknown") == []
    router.update_replicas([Taking(f"r{index}").tells("a", backlog_s=index) for index in range(3)])  # type: ignore[misc]
    await order(router, list(router.curr_replicas.values()), await pending(generation(0, "a")))
    known = await known_replicas(BASE)
    assert [view.id for view in known] == ["r0", "r1", "r2"]
    assert [round(view.ahead_s) for view in known][1:] == [1, 2]
    assert known[0].ahead_s > 0
    assert replicas_known(BASE) == 3


async def test_callers_take_turns_to_ask_for_a_place_and_what_is_interactive_goes_first() -> None:
    def asks(number: int, share: str, priority: Priority = "interactive") -> GenerationRequest:
        return replace(generation(number), share=share, priority=priority)

    asked = [
        asks(0, "many", "batch"), asks(1, "many", "batch"), asks(2, "many"), asks(3, "one"), asks(4, "few", "batch"),
    ]  # fmt: skip
    requests = [await pending(one, number=number) for number, one in enumerate(asked)]
    for number, request in enumerate(requests):
        request.created_at = float(number)
    assert [request.metadata.request_id for request in by_turns(requests)] == ["r2", "r3", "r4", "r0", "r1"]


async def test_the_gateway_is_told_when_a_replica_joins_others_and_of_nothing_else(router: LeastWorkRouter) -> None:
    told: list[str] = []
    on_joined(BASE, lambda: told.append("joined"))

    async def run(*names: str) -> list[str]:
        router.update_replicas([Taking(name) for name in names])  # type: ignore[misc]
        await asyncio.sleep(0)
        return told

    assert await run("r0") == []
    assert await run("r0", "r1") == ["joined"]
    assert await run("r1") == ["joined"]
    assert await run("r1", "r2", "r3") == ["joined"] * 2
