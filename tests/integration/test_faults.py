"""What is accepted is answered, also when a replica or its device fails; what cannot be taken on is refused at once."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import openai
import psutil
import pytest
from ray import serve

from cluster.local_service import application_of
from serve_app.store.quarantine import MAX_FAILURES, PERIOD_S, SAME_PASS_S
from tests.faults.breaking import until
from tests.replicas.controlled import (
    APP,
    BASE,
    BREAKS_AFTER_PREVIEW,
    HANGS,
    IS_FULL,
    LATE,
    MAX_ONGOING,
    MAX_QUEUED,
    OVERFLOWS,
    Device,
)
from tests.service import Service, pixels_of, process_of

PROMPT = "a blue square on a red background"
REPLICA = f"{application_of(BASE, APP)}:base-demo--sd15"
NIGHT, STYLE, POPULAR = "demo/sd15-night", "demo/sd15-stripes", "demo/sd15-sepia"
# Many more than one service takes.
CALLERS = 5 * (MAX_ONGOING + MAX_QUEUED)
PLAIN, STREAMED = {"lora": NIGHT, "seed": 40}, {"seed": 41, "size": "96x96", "num_inference_steps": 8}

# Of the first test this is also the time in which cluster and service start; some wait for a new replica.
pytestmark = [pytest.mark.timeout(1200), pytest.mark.slow]


def test_callers_of_a_base_at_zero_are_told_when_to_come_back_and_then_get_their_images(
    controlled: tuple[Service, Device],
) -> None:
    service, _ = controlled
    plain = {"json": {"inputs": PROMPT}, "headers": {"x-wait-for-model": "false"}}

    def state() -> str:
        return next(base["state"] for base in service.http.get("/v1/bases").json() if base["id"] == LATE)

    assert state() == "stopped"
    refused = service.http.post(f"/models/{LATE}", **plain)
    assert (refused.status_code, refused.json()["code"]) == (503, "not_ready"), refused.text
    assert refused.json()["error"] == f"{LATE} is starting; try again in {refused.headers['retry-after']} s"
    # The one that was refused had it start.
    until(lambda: state() != "stopped", "a start")
    with streamed(service, PROMPT, model=LATE) as lines:
        names = [line.removeprefix("event: image_generation.") for line in lines if line.startswith("event: ")]
    assert names[:2] == ["progress", "starting"]
    assert names[-1] == "completed"
    assert service.http.post(f"/models/{LATE}", **plain).status_code == 200
    (usage,) = (row for row in service.http.get("/v1/usage").json()["data"] if row["base_model"] == LATE)
    assert usage["images"] == 2
    assert usage["device_seconds"] > 0


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(controlled: tuple[Service, Device]) -> None:
    service, device = controlled
    asked: list[Future[httpx.Response]] = []

    def are_refused(count: int) -> bool:
        # Serve counts one as waiting a moment after it has let it in: of a burst, more than are to wait may do so.
        asked.append(pool.submit(service.ask, PROMPT, seed=len(asked), num_inference_steps=2))
        return sum(future.done() for future in asked) >= count

    with ThreadPoolExecutor(CALLERS) as pool, device.held():
        until(lambda: are_refused(4), "four refusals", poll_s=0.3)
        refused = [future.result() for future in asked if future.done()]
    assert {reply.status_code for reply in refused} == {429}
    assert {future.result().status_code for future in asked} == {200, 429}
    assert all(int(reply.headers["retry-after"]) >= 1 for reply in refused)
    assert {reply.json()["code"] for reply in refused} == {"queue_full"}


def test_openai_s_client_comes_back_when_a_full_queue_says_so_until_it_has_its_image(
    controlled: tuple[Service, Device],
) -> None:
    service, device = controlled
    statuses: list[int] = []
    hooks = {"response": [lambda reply: statuses.append(reply.status_code)]}
    with (
        httpx.Client(event_hooks=hooks, trust_env=False, timeout=600) as http,
        openai.OpenAI(base_url=f"{service.url}/v1", api_key="unused", max_retries=100, http_client=http) as ai,
        ThreadPoolExecutor(CALLERS) as pool,
    ):
        asked: list[Future[openai.types.ImagesResponse]] = []

        def is_refused() -> bool:
            asked.append(pool.submit(ai.images.generate, prompt=PROMPT, extra_body={"num_inference_steps": 2}))
            return 429 in statuses

        with device.held():
            until(is_refused, "a refusal", poll_s=0.3)
            assert 200 not in statuses
        replies = [future.result() for future in asked]
    assert all(reply.data for reply in replies)
    assert statuses.count(200) == len(asked)


@contextmanager
def streamed(service: Service, prompt: str, **asked: Any) -> Iterator[Iterator[str]]:
    body = {"prompt": prompt, "stream": True, **asked}
    with service.http.stream("POST", "/v1/images/generations", json=body) as reply:
        yield reply.iter_lines()


def image_in(line: str) -> str:
    image: str = json.loads(line.removeprefix("data: "))["b64_json"]
    return image


@dataclass(frozen=True)
class Loss:
    """What became of a request that waited and a stream that ran when their replica was killed, and of that replica."""

    expected: tuple[np.ndarray, str]
    reply: httpx.Response
    lines: list[str]
    victim: int
    children: list[psutil.Process]


@pytest.fixture(scope="module")
def loss(controlled: tuple[Service, Device]) -> Loss:
    service, device = controlled
    for _ in range(3):
        service.draw(PROMPT, model=POPULAR, num_inference_steps=1)
    keeper = serve.get_deployment_handle("Keeper", APP)
    until(lambda: POPULAR in [spec.id for spec in keeper.popular.remote(BASE).result()], "word of the adapter's use")
    with streamed(service, PROMPT, **STREAMED) as lines:
        *_, reference, _ = lines
    expected = service.draw(PROMPT, **PLAIN), image_in(reference)
    device.wait_until_idle()
    victim = process_of(REPLICA)
    children = victim.children(recursive=True)
    with ThreadPoolExecutor(1) as pool, streamed(service, PROMPT, **STREAMED) as lines:
        with device.held():
            assert any('"step":1,' in line for line in lines)
            waiting = pool.submit(service.ask, PROMPT, **PLAIN)
            device.wait_until(lambda state: state.waiting == 1)
            os.kill(victim.pid, signal.SIGKILL)
            psutil.wait_procs([victim], timeout=60)
        return Loss(expected, waiting.result(), list(lines), victim.pid, children)


def test_a_request_that_waits_on_a_killed_replica_still_gets_its_image(loss: Loss) -> None:
    assert loss.reply.status_code == 200, loss.reply.text
    assert np.array_equal(pixels_of(loss.reply), loss.expected[0])
    assert process_of(REPLICA).pid != loss.victim


def test_a_stream_whose_replica_is_killed_before_a_picture_still_gets_its_image(loss: Loss) -> None:
    *progress, name, data, _ = loss.lines
    assert any('"step":1,' in line for line in progress), "it tells how far it is from the start"
    assert name == "event: image_generation.completed"
    assert image_in(data) == loss.expected[1]


def test_no_admission_process_outlives_its_replica(loss: Loss) -> None:
    assert loss.children, "the admission process should be there"
    _, left = psutil.wait_procs(loss.children, timeout=60)
    assert left == []


def test_a_new_replica_holds_the_adapters_that_are_in_use_before_anybody_asks_it(
    controlled: tuple[Service, Device], loss: Loss
) -> None:
    def shown() -> list[str]:
        return [place["tier"] for place in listed(controlled[0], POPULAR)["resident"]]

    until(lambda: shown() == ["host"], "the adapter in the new replica's memory")


def test_a_stream_whose_device_breaks_after_a_picture_ends_in_an_error_and_what_waits_gets_its_image(
    controlled: tuple[Service, Device],
) -> None:
    service, device = controlled
    # Longer than what breaks, so that the device does not turn to it before.
    longer: dict[str, Any] = PLAIN | {"num_inference_steps": 30, "width": 96, "height": 96}
    reference = service.draw(PROMPT, **longer)
    victim = process_of(REPLICA)
    asked = {"num_inference_steps": 8, "partial_images": 3}
    with ThreadPoolExecutor(1) as pool, streamed(service, BREAKS_AFTER_PREVIEW, **asked) as lines:
        with device.held():
            assert any('"step":1,' in line for line in lines)
            waiting = pool.submit(service.ask, PROMPT, **longer)
            device.wait_until(lambda state: state.waiting == 1)
        *told, name, data, _ = lines
    assert "event: image_generation.partial_image" in told
    assert name == "event: error"
    fault = json.loads(data.removeprefix("data: "))["error"]
    assert fault["code"] == "replica_lost"
    assert "try again" in fault["message"]
    reply = waiting.result()
    assert reply.status_code == 200, reply.text
    assert np.array_equal(pixels_of(reply), reference)
    until(lambda: not psutil.pid_exists(victim.pid), "the end of the broken replica")


def test_a_device_that_hangs_is_replaced_and_its_request_still_gets_its_image(
    controlled: tuple[Service, Device],
) -> None:
    service, _ = controlled
    reference = service.draw(PROMPT, seed=3)
    victim = process_of(REPLICA)
    reply = service.ask(HANGS, seed=3)
    assert reply.status_code == 200, reply.text
    assert process_of(REPLICA).pid != victim.pid
    # The replica after it draws the same, of this prompt and of others.
    assert np.array_equal(service.draw(HANGS, seed=3), pixels_of(reply))
    assert np.array_equal(service.draw(PROMPT, seed=3), reference)


def test_a_full_device_is_a_503_with_advice_and_the_next_image_is_the_same_bits(
    controlled: tuple[Service, Device],
) -> None:
    service, _ = controlled
    reference = service.draw(PROMPT, **PLAIN)
    victim = process_of(REPLICA)
    reply = service.ask(IS_FULL, lora=NIGHT)
    assert (reply.status_code, reply.json()["code"]) == (503, "out_of_memory")
    assert "smaller size or fewer images" in reply.json()["error"]
    assert int(reply.headers["retry-after"]) > 0
    assert np.array_equal(service.draw(PROMPT, **PLAIN), reference)
    assert process_of(REPLICA).pid == victim.pid


def listed(service: Service, model: str) -> dict[str, Any]:
    (found,) = [row for row in service.http.get("/v1/loras").json()["data"] if row["id"] == model]
    return found


def test_an_adapter_that_overflows_is_named_then_quarantined_and_the_registry_shows_why(
    controlled: tuple[Service, Device],
) -> None:
    service, _ = controlled
    reference = service.draw(PROMPT, **PLAIN)
    assert listed(service, STYLE)["quarantine"] == []
    replies = []
    for _ in range(MAX_FAILURES + 1):
        replies.append(service.ask(OVERFLOWS, lora=STYLE, num_inference_steps=2))
        time.sleep(SAME_PASS_S)  # closer to each other they would count as one
    assert [(reply.status_code, reply.json()["code"]) for reply in replies] == [
        *[(422, "non_finite")] * MAX_FAILURES,
        (422, "quarantined"),
    ]
    assert all(STYLE in reply.json()["error"] for reply in replies)
    assert 0 < int(replies[-1].headers["retry-after"]) <= PERIOD_S

    # Replicas are asked at most once a second.
    until(lambda: listed(service, STYLE)["quarantine"] != [], "word of the quarantine")
    (held,) = listed(service, STYLE)["quarantine"]
    assert held["beside"] == 0
    assert held["reason"].startswith(f"its last {MAX_FAILURES} tries failed: the image")
    assert 0 < held["retry_after_s"] <= PERIOD_S
    alone = service.http.get(f"/v1/loras/{STYLE}").json()["quarantine"]
    assert [one["replica"] for one in alone] == [held["replica"]]
    # Others are served meanwhile, with the bits that they had before.
    assert np.array_equal(service.draw(PROMPT, **PLAIN), reference)
