"""Callers who leave, at every stage and in either shape: the steps that the device ran are counted, not guessed."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from ray import serve

from serve_app.settings import ReplicaSettings
from tests.hub_server import CDN, HubServer
from tests.service import EMBEDDED, Service

PROMPT = "a white cross on a green background"
BASE = "demo/sd15"
STEPS = 50
BATCH_IMAGES = ReplicaSettings().max_batch_images
PATIENCE_S = 60


class Device:
    """What the one replica of a base says of itself."""

    def __init__(self, base: str) -> None:
        self._handle = serve.get_deployment_handle(f"base-{base.replace('/', '--')}", "loraplex")

    def state(self) -> Any:
        return self._handle.state.remote().result(timeout_s=PATIENCE_S)

    def wait_until(self, is_so: Callable[[Any], bool]) -> Any:
        """Ask again and again; return the state that answers."""
        ends_at = time.monotonic() + PATIENCE_S
        while not is_so(state := self.state()):
            assert time.monotonic() < ends_at, state
        return state

    def wait_until_idle(self) -> Any:
        return self.wait_until(lambda state: state.waiting == state.running == 0)


@pytest.fixture
def device(service: Service) -> Device:
    device = Device(BASE)
    device.wait_until_idle()
    return device


@contextlib.contextmanager
def caller(service: Service, path: str, body: dict[str, Any]) -> Iterator[socket.socket]:
    """Send a request and be there, without reading, until the end of the block."""
    parts = urlsplit(service.url)
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    )
    with socket.create_connection((parts.hostname or "", parts.port or 80), timeout=PATIENCE_S) as connection:
        connection.sendall(head.encode() + content)
        yield connection


def huggingface(**parameters: Any) -> tuple[str, dict[str, Any]]:
    return f"/models/{BASE}", {
        "inputs": PROMPT,
        "parameters": {"num_inference_steps": STEPS, "width": 128, "height": 128, **parameters},
    }


def openai(*, stream: bool) -> tuple[str, dict[str, Any]]:
    return "/v1/images/generations", {
        "model": BASE, "prompt": PROMPT, "n": 4, "size": "128x128", "num_inference_steps": STEPS, "stream": stream,
    }  # fmt: skip


SHAPES = {"huggingface": huggingface(), "openai": openai(stream=False), "stream": openai(stream=True)}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_caller_who_leaves_stops_the_steps(service: Service, device: Device, shape: str) -> None:
    before = device.state().steps
    with caller(service, *SHAPES[shape]):
        seen = device.wait_until(lambda state: state.steps > before)
    ended = device.wait_until_idle()
    assert seen.steps - before < STEPS, "it was over before anybody could leave"
    assert ended.steps - before < STEPS


@pytest.mark.parametrize("shape", SHAPES)
def test_a_caller_who_leaves_the_queue_costs_no_step(service: Service, device: Device, shape: str) -> None:
    before = device.state().steps
    # Neither can join the pass of the other: their sizes differ.
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(service.draw, PROMPT, model=BASE, num_inference_steps=STEPS, width=128, height=96)
        device.wait_until(lambda state: state.running == 1)
        with caller(service, *SHAPES[shape]):
            device.wait_until(lambda state: state.waiting == 1)
        left = device.wait_until(lambda state: state.waiting == 0)
        assert left.running == 1
        first.result()
    assert device.wait_until_idle().steps - before == STEPS


def test_a_caller_who_leaves_while_an_adapter_is_fetched_costs_no_step_and_no_second_fetch(
    service: Service, device: Device, hub: HubServer
) -> None:
    repo = "acme/slow-stripes"
    hub.push_folder(repo, EMBEDDED / "demo" / "sd15-stripes")
    hub.hold(repo, is_downloads_only=True)
    before = device.state().steps

    def downloads(hub: HubServer) -> int:
        return sum(
            request.repo_id == repo and request.kind == CDN and request.range is None for request in hub.requests
        )

    _, body = openai(stream=True)
    try:
        with caller(service, "/v1/images/generations", body | {"model": repo}):
            hub.wait_for(lambda hub: downloads(hub) == 1, timeout_s=PATIENCE_S)
    finally:
        hub.release(repo)
    service.draw(PROMPT, model=repo, num_inference_steps=3)
    assert device.wait_until_idle().steps - before == 3
    assert downloads(hub) == 1


def test_a_deadline_stops_the_steps(service: Service, device: Device) -> None:
    before = device.state().steps
    reply = service.http.post(f"/models/{BASE}", json=huggingface()[1], headers={"x-request-timeout-s": "0.2"})
    assert reply.status_code == 504
    assert device.wait_until_idle().steps - before < STEPS


def test_half_of_a_hundred_leave_free_their_places_and_change_no_image_of_the_others(
    service: Service, device: Device
) -> None:
    adapters = ("", "demo/sd15-night", "demo/sd15-inverted")
    steps = 4

    def drawn(index: int) -> np.ndarray[Any, Any]:
        asked = {"lora": adapters[index % 3], "seed": index % 5, "num_inference_steps": steps}
        return service.draw(PROMPT, model=BASE, **asked)

    references = [drawn(index) for index in range(15)]
    before = device.wait_until_idle().steps
    shapes = ("stream", "openai", "huggingface") * 17
    with contextlib.ExitStack() as leaving, ThreadPoolExecutor(50) as pool:
        callers = [leaving.enter_context(caller(service, *SHAPES[shape])) for shape in shapes[:50]]
        # The replica takes no question of ours while it is full, so the first of them tells when it runs.
        assert any(b'"step":1,' in line for line in callers[0].makefile("rb"))
        staying = [pool.submit(drawn, index) for index in range(50)]
        random.Random(0).shuffle(callers)
        for gone in callers:
            gone.shutdown(socket.SHUT_RDWR)
        images = [future.result() for future in staying]
    ran = device.wait_until_idle().steps - before
    # Beside the steps of those who stayed, not a quarter of what those who left had asked for. How soon it is known
    # that they left is the machine's affair; what a single one costs is counted exactly above.
    images_left = sum(body.get("n", 1) for _, body in (SHAPES[shape] for shape in shapes[:50]))
    passes_left = -(-images_left // BATCH_IMAGES)
    assert ran < 50 * steps + passes_left * STEPS / 4
    for index, image in enumerate(images):
        # Batches of several images round differently, by one level of 255.
        assert abs(image.astype(int) - references[index % 15]).max() <= 1
