"""A request that ends the process of its replica is sent to one other replica, and then no more."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import serve

from serve_app.config import AppConfig
from serve_app.core import GenerationRequest
from serve_app.deployments.ingress.dispatcher import Dispatcher
from serve_app.deployments.ingress.process_state import has_ended
from serve_app.errors import LoraplexError
from tests.replicas.sleeper import BASE, sleeping_request, sleeping_use

POISON = 666
pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]


# Ray itself sends a request again whose replica ends before it has told that it took it.
TAKEN_AFTER_S = 3.0


@serve.deployment(num_replicas=3, health_check_period_s=1.0)
class Mortal:
    """Ends its process on the request with seed 666, once that counts as taken, and writes down that it did."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def generate(self, request: GenerationRequest) -> str:
        if request.seed == POISON:
            await asyncio.sleep(TAKEN_AFTER_S)
            (self._folder / str(os.getpid())).touch()
            os._exit(1)
        return request.request_id


@ray.remote(num_cpus=0)
class Sender:
    """An ingress replica's way to the base, in a process of its own."""

    def __init__(self) -> None:
        config = AppConfig.model_validate({"bases": [{"id": BASE, "source": {"embedded": "demo/sd15"}}]})
        handle = serve.get_deployment_handle("Mortal", "mortal")
        self._dispatcher = Dispatcher(config.ingress, {BASE: handle}, on_retry=lambda base, why: None)
        self._dispatcher.serve(config.bases)

    async def send(self, number: int, style: str) -> str:
        call: Any = self._dispatcher(sleeping_request(number, *([sleeping_use(f"me/{style}")] if style else [])))
        try:
            return await asyncio.wait_for(call, 120)
        except LoraplexError as error:
            return f"{error.code}: {error}"


@pytest.fixture
def sender(cluster: int, tmp_path: Path) -> Iterator[Any]:
    serve.run(Mortal.bind(tmp_path), name="mortal", route_prefix=None)
    made = Sender.remote()
    yield made
    ray.kill(made)
    serve.delete("mortal")


def test_a_request_that_ended_two_replicas_is_not_sent_to_a_third_and_its_adapters_are_quarantined(
    sender: Any, tmp_path: Path
) -> None:
    answer = ray.get(sender.send.remote(POISON, "bad"), timeout=150)
    assert answer.startswith("quarantined:")
    assert "2 replicas ended while they drew with it" in answer
    assert len(list(tmp_path.iterdir())) == 2
    # With the same adapter nothing is sent for a while; other requests go on.
    assert ray.get(sender.send.remote(1, "bad"), timeout=150).startswith("quarantined:")
    assert ray.get(sender.send.remote(1, "good"), timeout=150) == "request-1"
    assert len(list(tmp_path.iterdir())) == 2


@ray.remote(num_cpus=0)
class Plain:
    def ready(self) -> bool:
        return True


def test_ray_tells_whether_the_process_of_an_actor_has_ended(cluster: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_app.deployments.ingress.process_state.PATIENCE_S", 1.0)
    actor = Plain.remote()
    assert ray.get(actor.ready.remote())
    actor_id = actor._actor_id.hex()
    assert not asyncio.run(has_ended(actor_id))
    ray.kill(actor)
    monkeypatch.undo()
    assert asyncio.run(has_ended(actor_id))
