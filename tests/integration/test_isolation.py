"""A slow adapter delays only its own requests, and a caller who leaves frees its place."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import numpy as np
import pytest

from tests.hub_server import CDN, HubServer
from tests.replicas.controlled import BASE, Device, caller
from tests.service import Service

PROMPT = "a yellow triangle on a purple background"

# Of the first test this is also the time in which cluster and service start.
pytestmark = pytest.mark.timeout(1200)


def test_other_adapters_are_served_while_one_is_still_downloading(service: Service, hub: HubServer) -> None:
    hub.hold("acme/slow-inverted", is_downloads_only=True)
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(service.ask, PROMPT, model="acme/slow-inverted", seed=1)
        try:
            hub.wait_for(is_downloading, timeout_s=60)
            for style in ("night", "sepia", "sketch"):
                service.draw(PROMPT, model=f"demo/sdxl-{style}", seed=1, num_inference_steps=2)
            service.draw(PROMPT, model="demo/sdxl", seed=1, num_inference_steps=2)
            assert not slow.done()
        finally:
            hub.release("acme/slow-inverted")
        reply = slow.result()
    assert reply.status_code == 200, reply.text


def is_downloading(hub: HubServer) -> bool:
    """Whether the whole file, not only its header, has been asked for."""
    return any(
        request.repo_id == "acme/slow-inverted" and request.kind == CDN and request.range is None
        for request in hub.requests
    )


def test_the_status_route_answers_byte_for_byte_while_a_generation_runs(service: Service, device: Device) -> None:
    before = device.wait_until_idle().steps
    with ThreadPoolExecutor(1) as pool, device.held():
        running = pool.submit(service.draw, PROMPT, model=BASE)
        device.wait_until(lambda state: state.steps > before)
        answers = [httpx.get(f"{service.url}/", timeout=60, trust_env=False).content for _ in range(10)]
        assert not running.done()
    assert running.result().shape == (64, 64, 3)
    assert set(answers) == {b'{"ok":"ok"}'}


def test_callers_who_leave_free_their_places_and_change_no_other_image(service: Service, device: Device) -> None:
    reference = service.draw(PROMPT, model="demo/sd15-night", seed=30)
    before = device.wait_until_idle().steps
    parameters = {"num_inference_steps": 50, "width": 128, "height": 128}
    with device.held():
        with ExitStack() as leaving:
            for _ in range(4):
                leaving.enter_context(caller(service, f"/models/{BASE}", {"inputs": PROMPT, "parameters": parameters}))
            device.wait_until(lambda state: state.running + state.waiting == 4 and state.steps > before)
        assert device.wait_until_idle().steps - before == 1
    assert np.array_equal(service.draw(PROMPT, model="demo/sd15-night", seed=30), reference)
