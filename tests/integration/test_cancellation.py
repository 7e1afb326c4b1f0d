"""Callers who leave, at every stage and in either shape: the steps that the device ran are counted, not guessed."""

from __future__ import annotations

import contextlib
import random
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from serve_app.settings import ReplicaSettings
from tests.hub_server import CDN, HubServer
from tests.replicas.controlled import BASE, PATIENCE_S, Device, caller
from tests.service import EMBEDDED, Service

PROMPT = "a white cross on a green background"
STEPS = 50
BATCH_IMAGES = ReplicaSettings().max_batch_images
# A deadline that passes before the first step says nothing, so the next one is longer.
DEADLINES_S = ("0.2", "2", "20")

# Of the first test this is also the time in which cluster and service start.
pytestmark = pytest.mark.timeout(1200)


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
    with device.held():
        with caller(service, *SHAPES[shape]):
            device.wait_until(lambda state: state.steps > before)
        assert device.wait_until_idle().steps - before == 1


@pytest.mark.parametrize("shape", SHAPES)
def test_a_caller_who_leaves_the_queue_costs_no_step(service: Service, device: Device, shape: str) -> None:
    steps = 4
    before = device.state().steps
    with ThreadPoolExecutor(1) as pool, device.held():
        # Neither can join the pass of the other: their sizes differ.
        first = pool.submit(service.draw, PROMPT, model=BASE, num_inference_steps=steps, width=128, height=96)
        device.wait_until(lambda state: state.running == 1)
        with caller(service, *SHAPES[shape]):
            device.wait_until(lambda state: state.waiting == 1)
        left = device.wait_until(lambda state: state.waiting == 0)
        assert left.running == 1
    first.result()
    assert device.wait_until_idle().steps - before == steps


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
            device.wait_until(lambda state: state.work.pending_fetches == 1)
        # The replica knows that the caller has left; only then comes what it would have drawn with.
        device.wait_until(lambda state: state.work.pending_fetches == 0)
    finally:
        hub.release(repo)
    service.draw(PROMPT, model=repo, num_inference_steps=3)
    assert device.wait_until_idle().steps - before == 3
    assert downloads(hub) == 1


def test_a_deadline_stops_the_steps(service: Service, device: Device) -> None:
    before = ended = device.state().steps
    path, body = huggingface()
    with device.held():
        for deadline_s in DEADLINES_S:
            reply = service.http.post(path, json=body, headers={"x-request-timeout-s": deadline_s})
            assert reply.status_code == 504
            ended = device.wait_until_idle().steps
            if ended > before:
                break
    assert ended - before == 1


def test_half_of_forty_leave_free_their_places_and_change_no_image_of_the_others(
    service: Service, device: Device
) -> None:
    adapters = ("", "demo/sd15-night", "demo/sd15-inverted")
    steps = 4

    def drawn(index: int) -> np.ndarray[Any, Any]:
        asked = {"lora": adapters[index % 3], "seed": index % 5, "num_inference_steps": steps}
        return service.draw(PROMPT, model=BASE, **asked)

    references = [drawn(index) for index in range(15)]
    before = device.wait_until_idle().steps
    shapes = ("stream", "openai", "huggingface") * 7
    with contextlib.ExitStack() as leaving, ThreadPoolExecutor(20) as pool:
        # The replica takes no question of ours while it is full, so the first of them tells when it runs.
        callers = [leaving.enter_context(caller(service, *SHAPES[shapes[0]]))]
        assert any(b'"step":1,' in line for line in callers[0].makefile("rb"))
        callers += [leaving.enter_context(caller(service, *SHAPES[shape])) for shape in shapes[1:20]]
        staying = [pool.submit(drawn, index) for index in range(20)]
        random.Random(0).shuffle(callers)
        for gone in callers:
            gone.shutdown(socket.SHUT_RDWR)
        images = [future.result() for future in staying]
    ran = device.wait_until_idle().steps - before
    # Beside the steps of those who stayed, not a quarter of what those who left had asked for. How soon it is known
    # that they left is the machine's affair; what a single one costs is counted exactly above.
    images_left = sum(body.get("n", 1) for _, body in (SHAPES[shape] for shape in shapes[:20]))
    passes_left = -(-images_left // BATCH_IMAGES)
    assert ran < 20 * steps + passes_left * STEPS / 4
    for index, image in enumerate(images):
        # Batches of several images round differently, by one level of 255.
        assert abs(image.astype(int) - references[index % 15]).max() <= 1
