"""A slow adapter delays only its own requests, and a caller who leaves frees its place."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest

from tests.hub_server import CDN, HubServer
from tests.service import Service

PROMPT = "a yellow triangle on a purple background"


def test_other_adapters_are_served_while_one_is_still_downloading(service: Service, hub: HubServer) -> None:
    hub.hold("acme/slow-inverted", is_downloads_only=True)
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(service.ask, PROMPT, model="acme/slow-inverted", seed=1)
        try:
            hub.wait_for(is_downloading, timeout_s=60)
            for style in ("night", "sepia", "sketch"):
                service.draw(PROMPT, model=f"demo/sdxl-{style}", seed=1)
            service.draw(PROMPT, model="demo/sdxl", seed=1)
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


def test_the_status_route_answers_byte_for_byte_while_a_generation_runs(service: Service) -> None:
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(service.draw, PROMPT, model="demo/sdxl", num_inference_steps=50)
        answers = [httpx.get(service.url, trust_env=False).content]
        while not running.done():
            answers.append(httpx.get(service.url, trust_env=False).content)
    assert len(answers) > 1
    assert set(answers) == {b'{"ok":"ok"}'}


def test_callers_who_leave_free_their_places_and_change_no_other_image(service: Service) -> None:
    reference = service.draw(PROMPT, model="demo/sd15-night", seed=30)
    leaving = threading.Event()

    def hang_up() -> None:
        with httpx.Client(base_url=service.url, trust_env=False) as client, pytest.raises(httpx.ReadTimeout):
            client.post(
                "/models/demo/sd15",
                json={
                    "inputs": PROMPT,
                    "parameters": {"num_inference_steps": 50, "width": 128, "height": 128},
                },
                timeout=httpx.Timeout(60, read=0.5),
            )
        leaving.set()

    with ThreadPoolExecutor(6) as pool:
        for future in [pool.submit(hang_up) for _ in range(6)]:
            future.result()
    assert leaving.is_set()
    # All six would take far longer than one request if they still held the device.
    assert np.array_equal(service.draw(PROMPT, model="demo/sd15-night", seed=30), reference)
