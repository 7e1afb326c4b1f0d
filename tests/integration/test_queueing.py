"""What callers meet when a base has more to do than it can, and what a new replica has ready."""

from __future__ import annotations

import asyncio
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
from ray import serve
from ray.serve.handle import DeploymentHandle

from serve_app.config import AppConfig
from serve_app.core import GenerationResult
from serve_app.deployments.ingress.backpressure import WINDOW_S
from serve_app.deployments.ingress.dispatcher import Dispatcher
from serve_app.engine.worker.scheduling import QueuePolicy
from serve_app.errors import QueueFull
from serve_app.routing.router import router_config
from serve_app.work import LatencyModel
from tests.replicas.sleeper import BASE, Sleeper, sleeping_request, sleeping_use
from tests.replicas.sleeping import Sleeps
from tests.replicas.watched import Pass, WatchedReplica
from tests.service import Service

WAIT_S = 60.0

# The adversarial stream: nine of ten requests are for one adapter, and as many come as two replicas can serve.
PASS_S, REPLICAS = 0.04, 2
BEFORE, AFTER = 50, 40
NO_BOUND = 10**6


def deploy(app: str, num_replicas: int) -> DeploymentHandle:
    deployment = Sleeper.options(
        num_replicas=num_replicas,
        max_ongoing_requests=2,
        max_queued_requests=6,
        ray_actor_options={"num_cpus": 0.1},
    )
    return serve.run(deployment.bind(), name=app, route_prefix=None)


async def all_of(handle: DeploymentHandle, num_replicas: int, method: str, *args: Any) -> list[Any]:
    """Return what each replica answers, once the handle has heard of all; until then others are asked again."""
    ends_at = time.monotonic() + WAIT_S
    while len(answers := await handle.broadcast(method, *args).results_async()) != num_replicas:
        assert time.monotonic() < ends_at, f"{len(answers)} of {num_replicas} replicas answered"
        await asyncio.sleep(0.05)
    return answers


def test_an_unknown_priority_is_refused_and_a_known_one_served(service: Service) -> None:
    body = {"inputs": "a house", "parameters": {"num_inference_steps": 1}}
    refused = service.http.post("/", json=body, headers={"x-priority": "urgent"})
    assert refused.status_code == 400
    assert refused.json()["error"] == "'x-priority' is urgent, but must be interactive or batch"
    assert service.http.post("/", json=body, headers={"x-priority": "batch"}).status_code == 200


async def test_whoever_is_refused_by_a_full_queue_is_told_when_to_ask_again(app: str) -> None:
    base = {"id": BASE, "source": {"embedded": BASE}, "replica": {"max_queued_requests": 6}}
    config = AppConfig.model_validate({"bases": [base]})
    dispatch = Dispatcher(config.ingress, {BASE: deploy(app, 1)}, on_retry=lambda _, __: None)
    dispatch.serve(config.bases)
    began_s = time.monotonic()
    for number in range(2):
        await dispatch(sleeping_request(number))
    refused: list[tuple[int, float]] = []

    async def send(number: int) -> GenerationResult | None:
        try:
            return await dispatch(sleeping_request(number))
        except QueueFull as error:
            refused.append((error.retry_after_s, time.monotonic() - began_s))
            return None

    endings = await asyncio.wait_for(asyncio.gather(*map(send, range(40))), WAIT_S)
    served = [ending for ending in endings if ending is not None]
    assert len(served) + len(refused) == 40
    assert refused
    # Six may wait; whether two more had begun by then is Serve's haste.
    assert len(served) >= 6
    # Each takes a quarter of a second, and at least six of them were out when the first was refused.
    assert min(retry_after_s for retry_after_s, _ in refused) >= 2
    for retry_after_s, passed_s in refused:
        # At most forty were out, and at least two done; what is done fades while the machine takes its time.
        each_s = WINDOW_S * math.expm1(passed_s / WINDOW_S) / 2
        assert retry_after_s <= math.ceil(40 * each_s)


@pytest.fixture(scope="module")
def watched(cluster: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeploymentHandle]:
    folder = tmp_path_factory.mktemp("adapters")
    (folder / sleeping_use("me/hot").spec.filename).write_bytes(b"0" * 100)
    sleeps = Sleeps(
        LatencyModel(PASS_S, 0.0), swap_s=0.005, fetch_s=0.0, host_adapters=16, file_bytes=100, max_batch_images=1,
        policy=QueuePolicy(),
    )  # fmt: skip
    config = AppConfig.model_validate({"bases": [{"id": BASE, "source": {"embedded": BASE}}], "disk_cache": 0})
    deployment = WatchedReplica.options(
        num_replicas=REPLICAS,
        max_ongoing_requests=BEFORE + AFTER,
        ray_actor_options={"num_cpus": 0.1},
        request_router_config=router_config(config.bases[0]),
    )
    yield serve.run(deployment.bind(sleeps, folder), name="watched", route_prefix=None)
    serve.delete("watched")


async def stream(handle: DeploymentHandle, policy: QueuePolicy) -> list[list[Pass]]:
    """Send the adversarial stream, and return what each replica ran, once everything was answered.

    The first requests wait until all of them are there, so that the queues are long from the first pass on; the others
    come at a steady rate, whatever is answered.
    """

    async def send(number: int) -> None:
        use = sleeping_use("me/hot" if number % 10 != 4 else f"me/cold-{number % 3}")
        await handle.options(multiplexed_model_id=use.spec.key).generate.remote(sleeping_request(number, use))

    await all_of(handle, REPLICAS, "hold", policy)
    calls = [asyncio.create_task(send(number)) for number in range(BEFORE)]
    began_s = time.monotonic()
    while sum(await handle.broadcast("waiting").results_async()) < BEFORE:
        assert time.monotonic() - began_s < WAIT_S
        await asyncio.sleep(0.02)
    await handle.broadcast("release").results_async()
    for number in range(BEFORE, BEFORE + AFTER):
        calls.append(asyncio.create_task(send(number)))
        await asyncio.sleep(PASS_S / REPLICAS)
    await asyncio.wait_for(asyncio.gather(*calls), WAIT_S)
    histories = await handle.broadcast("history").results_async()
    assert sum(len(one.tickets) for history in histories for one in history) == BEFORE + AFTER
    return histories


def overtakings(histories: list[list[Pass]]) -> list[list[float]]:
    """Return for each request that was overtaken when that happened, counted from what ran while it waited."""
    times: dict[tuple[int, int], list[float]] = defaultdict(list)
    for replica, history in enumerate(histories):
        for one in history:
            for ticket in one.waiting:
                if ticket < one.tickets[0] and ticket not in one.tickets:
                    times[replica, ticket].append(one.at_s)
    return list(times.values())


async def test_a_stream_for_one_adapter_overtakes_no_other_request_more_often_than_allowed(
    watched: DeploymentHandle,
) -> None:
    histories = await stream(watched, QueuePolicy(max_overtakes=4, max_overtaken_s=NO_BOUND))
    assert max(map(len, overtakings(histories))) == 4


async def test_a_stream_for_one_adapter_overtakes_no_other_request_for_longer_than_allowed(
    watched: DeploymentHandle,
) -> None:
    histories = await stream(watched, QueuePolicy(max_overtakes=NO_BOUND, max_overtaken_s=0.15))
    assert max(times[-1] - times[0] for times in overtakings(histories)) < 0.15


async def test_without_bounds_the_same_stream_overtakes_others_for_as_long_as_it_lasts(
    watched: DeploymentHandle,
) -> None:
    histories = await stream(watched, QueuePolicy(max_overtakes=NO_BOUND, max_overtaken_s=NO_BOUND))
    overtaken = overtakings(histories)
    assert max(map(len, overtaken)) > 3 * 4
    assert max(times[-1] - times[0] for times in overtaken) > 4 * 0.15
