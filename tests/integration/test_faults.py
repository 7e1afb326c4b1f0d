"""What is accepted is answered, also when a replica dies; what cannot be taken on is refused at once."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import psutil
import pytest
from ray import serve

from serve_app.app import assemble
from serve_app.config import AppConfig
from tests.faults.breaking import until
from tests.replicas.failing import HANGS, HANGS_AFTER_PREVIEW, HANGS_AFTER_STEP, WAITS, FailingReplica
from tests.service import Service, base_settings, pixels_of, process_of

PROMPT = "a blue square on a red background"
REPLICA = "fragile:base-demo--sd15"

# Of the first test this is also the time in which cluster and service start; each waits for a new replica.
pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def marks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the device's faults leave their marks."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def fragile(cluster: int, marks: Path) -> Iterator[Service]:
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
            "cache_dir": str(marks),
        }
    )
    serve.run(assemble(config, FailingReplica), name="fragile", route_prefix="/fragile")
    service = Service(f"http://127.0.0.1:{cluster}/fragile")
    # A new replica takes its time to start.
    service.http.timeout = 600
    yield service
    serve.delete("fragile")


@contextmanager
def device_waiting(marks: Path) -> Iterator[None]:
    """Let no pass of the prompt `WAITS` begin before the end of the block."""
    (marks / WAITS).unlink(missing_ok=True)
    try:
        yield
    finally:
        (marks / WAITS).touch()


@contextmanager
def without_fault(marks: Path, prompt: str) -> Iterator[None]:
    """Let a prompt that ends a replica draw like any other, until the end of the block."""
    (marks / prompt).touch()
    try:
        yield
    finally:
        (marks / prompt).unlink()


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(fragile: Service, marks: Path) -> None:
    with ThreadPoolExecutor(8) as pool, device_waiting(marks):
        asked = [pool.submit(fragile.ask, WAITS, seed=seed) for seed in range(8)]
        # One runs and two wait; the first of all may take a place of theirs until it is with the replica.
        until(lambda: sum(future.done() for future in asked) >= 5, "five refusals")
        refused = [future.result() for future in asked if future.done()]
    assert {reply.status_code for reply in refused} == {429}
    assert {future.result().status_code for future in asked} == {200, 429}
    assert all(int(reply.headers["retry-after"]) >= 1 for reply in refused)
    assert {reply.json()["code"] for reply in refused} == {"queue_full"}


def test_openai_s_client_comes_back_when_a_full_queue_says_so_until_it_has_its_image(
    fragile: Service, marks: Path
) -> None:
    statuses: list[int] = []
    hooks = {"response": [lambda reply: statuses.append(reply.status_code)]}
    with (
        httpx.Client(event_hooks=hooks, trust_env=False, timeout=600) as http,
        openai.OpenAI(base_url=f"{fragile.url}/v1", api_key="unused", max_retries=100, http_client=http) as ai,
        ThreadPoolExecutor(8) as pool,
    ):
        with device_waiting(marks):
            asked = [pool.submit(ai.images.generate, prompt=WAITS) for _ in range(8)]
            until(lambda: 429 in statuses, "a refusal")
            assert 200 not in statuses
        replies = [future.result() for future in asked]
    assert all(reply.data for reply in replies)
    assert statuses.count(200) == 8


def test_a_request_whose_replica_is_killed_still_gets_its_image(fragile: Service, marks: Path) -> None:
    asked = {"lora": "demo/sd15-night", "seed": 40}
    with without_fault(marks, HANGS):
        reference = fragile.draw(HANGS, **asked)
    victim = process_of(REPLICA)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(fragile.ask, HANGS, **asked)
        until((marks / HANGS).exists, "the hang")
        os.kill(victim.pid, signal.SIGKILL)
        reply = running.result()
    assert reply.status_code == 200, reply.text
    assert np.array_equal(pixels_of(reply), reference)
    assert process_of(REPLICA).pid != victim.pid


@contextmanager
def streamed(service: Service, prompt: str, **asked: Any) -> Iterator[Iterator[str]]:
    body = {"prompt": prompt, "seed": 41, "stream": True, "num_inference_steps": 50, "size": "128x128", **asked}
    with service.http.stream("POST", "/v1/images/generations", json=body) as reply:
        yield reply.iter_lines()


def test_a_stream_whose_replica_is_killed_before_a_picture_still_gets_its_image(fragile: Service, marks: Path) -> None:
    with without_fault(marks, HANGS_AFTER_STEP), streamed(fragile, HANGS_AFTER_STEP) as lines:
        *_, reference, _ = lines
    victim = process_of(REPLICA)
    with streamed(fragile, HANGS_AFTER_STEP) as lines:
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
    victim = process_of(REPLICA)
    with streamed(fragile, HANGS_AFTER_PREVIEW, n=4, partial_images=3) as lines:
        assert "event: image_generation.partial_image" in lines
        os.kill(victim.pid, signal.SIGKILL)
        *_, name, data, _ = lines
    assert name == "event: error"
    fault = json.loads(data.removeprefix("data: "))["error"]
    assert fault["code"] == "replica_lost"
    assert "try again" in fault["message"]
    assert fragile.draw(PROMPT, seed=1).shape == (64, 64, 3)


def test_no_admission_process_outlives_its_replica(fragile: Service) -> None:
    victim = process_of(REPLICA)
    children = victim.children(recursive=True)
    assert children, "the admission process should be there"
    os.kill(victim.pid, signal.SIGKILL)
    _, left = psutil.wait_procs(children, timeout=60)
    assert left == []
