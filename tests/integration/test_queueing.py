"""What callers meet when a base has more to do than it can, and what a new replica has ready."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from ray import serve
from ray.serve.handle import DeploymentHandle

from serve_app.config import AppConfig
from serve_app.core import GenerationResult
from serve_app.deployments.ingress import Dispatcher
from serve_app.errors import QueueFull
from tests.engine_cases import use_of
from tests.service import Service
from tests.sleeper import BASE, Sleeper, sleeping_request

APP = "sleeping"
WAIT_S = 60.0


def deploy(num_replicas: int) -> DeploymentHandle:
    deployment = Sleeper.options(
        num_replicas=num_replicas,
        max_ongoing_requests=2,
        max_queued_requests=6,
        ray_actor_options={"num_cpus": 0.1},
    )
    return serve.run(deployment.bind(), name=APP, route_prefix=None)


@pytest.fixture
def clean(cluster: int) -> Iterator[None]:
    yield
    serve.delete(APP)


def test_an_unknown_priority_is_refused_and_a_known_one_served(service: Service) -> None:
    body = {"inputs": "a house", "parameters": {"num_inference_steps": 1}}
    refused = service.http.post("/", json=body, headers={"x-priority": "urgent"})
    assert refused.status_code == 400
    assert refused.json()["error"] == "'x-priority' is urgent, but must be interactive or batch"
    assert service.http.post("/", json=body, headers={"x-priority": "batch"}).status_code == 200


async def test_whoever_is_refused_by_a_full_queue_is_told_when_to_ask_again(clean: None) -> None:
    base = {"id": BASE, "source": {"embedded": BASE}, "replica": {"max_queued_requests": 6}}
    config = AppConfig.model_validate({"bases": [base]})
    dispatch = Dispatcher(config, {BASE: deploy(1)}, on_retry=lambda _: None)
    for number in range(2):
        await dispatch(sleeping_request(number))
    calls = [dispatch(sleeping_request(number)) for number in range(40)]
    endings = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), WAIT_S)
    served = [ending for ending in endings if isinstance(ending, GenerationResult)]
    refused = [ending for ending in endings if isinstance(ending, QueueFull)]
    assert len(served) + len(refused) == 40
    assert len(served) >= 2 + 6
    # Each takes a quarter of a second, and at least eight of them were out when the first was refused.
    assert all(2 <= error.retry_after_s <= 40 for error in refused)


async def test_a_new_replica_has_ready_what_its_siblings_are_asked_for(clean: None) -> None:
    handle = deploy(1)
    hot, cold = use_of("me/hot"), use_of("me/cold")
    for number, use in enumerate((hot, cold, hot)):
        await handle.generate.remote(sleeping_request(number, use))
    ready = await deploy(2).broadcast("made_ready").results_async()
    assert sorted(ready) == [[], ["me/hot", "me/cold"]]
