"""What is accepted is answered, also when a replica dies; what cannot be taken on is refused at once."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
import openai
import psutil
import pytest
from ray import serve

from serve_app.app import build
from serve_app.config import AppConfig
from tests.service import Service, base_settings, pixels_of

PROMPT = "a blue square on a red background"


@pytest.fixture(scope="module")
def fragile(cluster: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service of its own, with one replica that takes one request at a time and lets two wait for it."""
    config = AppConfig.model_validate(
        {
            "bases": [
                base_settings(
                    "demo/sd15",
                    replica={"num_cpus": 0.1, "max_ongoing_requests": 1, "max_queued_requests": 2},
                    autoscaling={"target_ongoing_requests": 1},
                )
            ],
            "adapters": {"embedded": True, "hub": {"enabled": False}},
            "ingress": {"replicas": 1, "num_cpus": 0.1},
            "cache_dir": str(tmp_path_factory.mktemp("cache")),
        }
    )
    serve.run(build(config), name="fragile", route_prefix="/fragile")
    yield Service(f"http://127.0.0.1:{cluster}/fragile")
    serve.delete("fragile")


def replica_process() -> psutil.Process:
    """The process of the fragile service's base replica."""
    marker = "fragile:base-demo--sd15"
    found = [p for p in psutil.process_iter(["cmdline"]) if marker in " ".join(p.info["cmdline"] or ())]
    assert len(found) == 1, found
    return found[0]


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(fragile: Service) -> None:
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda seed: fragile.ask(PROMPT, seed=seed, num_inference_steps=50), range(8)))
    statuses = [reply.status_code for reply in replies]
    assert set(statuses) == {200, 429}
    refused = next(reply for reply in replies if reply.status_code == 429)
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["code"] == "queue_full"


def test_openai_s_client_comes_back_when_a_full_queue_says_so_until_it_has_its_image(fragile: Service) -> None:
    statuses: list[int] = []
    hooks = {"response": [lambda reply: statuses.append(reply.status_code)]}
    with (
        httpx.Client(event_hooks=hooks, trust_env=False, timeout=60) as http,
        openai.OpenAI(base_url=f"{fragile.url}/v1", api_key="unused", max_retries=20, http_client=http) as ai,
        ThreadPoolExecutor(8) as pool,
    ):
        slow = {"num_inference_steps": 20}
        replies = list(pool.map(lambda _: ai.images.generate(prompt=PROMPT, extra_body=slow), range(8)))
    assert all(reply.data for reply in replies)
    assert statuses.count(200) == 8
    assert 429 in statuses


def test_a_request_whose_replica_is_killed_still_gets_its_image(fragile: Service) -> None:
    reference = fragile.draw(PROMPT, lora="demo/sd15-night", seed=40, num_inference_steps=50)
    victim = replica_process()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(fragile.ask, PROMPT, lora="demo/sd15-night", seed=40, num_inference_steps=50)
        wait_until_busy(victim)
        os.kill(victim.pid, signal.SIGKILL)
        reply = running.result()
    assert reply.status_code == 200, reply.text
    assert np.array_equal(pixels_of(reply), reference)
    assert replica_process().pid != victim.pid


@contextmanager
def streamed(service: Service, **asked: Any) -> Iterator[Iterator[str]]:
    body = {"prompt": PROMPT, "seed": 41, "stream": True, "num_inference_steps": 50, "size": "128x128", **asked}
    with service.http.stream("POST", "/v1/images/generations", json=body) as reply:
        yield reply.iter_lines()


def test_a_stream_whose_replica_is_killed_before_a_picture_still_gets_its_image(fragile: Service) -> None:
    with streamed(fragile) as lines:
        *_, reference, _ = lines
    victim = replica_process()
    with streamed(fragile) as lines:
        assert any('"step":1,' in line for line in lines)
        os.kill(victim.pid, signal.SIGKILL)
        *progress, name, data, _ = lines
    assert any('"step":1,' in line for line in progress), "it tells how far it is from the start"
    assert name == "event: image_generation.completed"
    assert image_in(data) == image_in(reference)


def image_in(line: str) -> str:
    image: str = json.loads(line.removeprefix("data: "))["b64_json"]
    return image


def test_a_stream_whose_replica_is_killed_after_a_picture_ends_in_an_error_that_says_to_try_again(
    fragile: Service,
) -> None:
    victim = replica_process()
    with streamed(fragile, n=4, partial_images=3) as lines:
        assert "event: image_generation.partial_image" in lines
        os.kill(victim.pid, signal.SIGKILL)
        *_, name, data, _ = lines
    assert name == "event: error"
    fault = json.loads(data.removeprefix("data: "))["error"]
    assert fault["code"] == "replica_lost"
    assert "try again" in fault["message"]
    assert fragile.draw(PROMPT, seed=1).shape == (64, 64, 3)


def wait_until_busy(process: psutil.Process) -> None:
    """Return once the process computes; the kernel's count of its CPU time says so."""
    before = process.cpu_times().user
    while process.cpu_times().user - before < 0.1:
        process.cpu_percent(interval=0.02)


def test_no_admission_process_outlives_its_replica(fragile: Service) -> None:
    victim = replica_process()
    children = victim.children(recursive=True)
    assert children, "the admission process should be there"
    os.kill(victim.pid, signal.SIGKILL)
    _, left = psutil.wait_procs(children, timeout=20)
    assert left == []
