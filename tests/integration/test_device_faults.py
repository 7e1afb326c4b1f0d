"""A device that hangs, breaks, is full or overflows, on a service with one replica: what was accepted is answered."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from ray import serve

from serve_app.app import assemble
from serve_app.config import AppConfig
from serve_app.store.quarantine import MAX_FAILURES, PERIOD_S, SAME_PASS_S
from tests.replicas.failing import BREAKS, HANGS, IS_FULL, OVERFLOWS, FailingReplica
from tests.service import Service, base_settings, pixels_of, process_of

PROMPT = "a blue square on a red background"
REPLICA = "failing:base-demo--sd15"
STYLE = "demo/sd15-stripes"
SHOWN_WITHIN_S = 120.0
# Longer than a pass, the first one on a busy machine too: else a replica that draws is replaced.
STALL_AFTER_S = 20.0

# Of the first test this is also the time in which cluster and service start; some wait for a new replica.
pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def failing(cluster: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    replica = {"num_cpus": 0.1, "torch_threads": 1, "stall_timeout_s": STALL_AFTER_S, "health_check_period_s": 1.0}
    config = AppConfig.model_validate(
        {
            "bases": [base_settings("demo/sd15", replica=replica)],
            "adapters": {"embedded": True, "hub": {"enabled": False}},
            "ingress": {"replicas": 1, "num_cpus": 0.1},
            "cache_dir": str(tmp_path_factory.mktemp("cache")),
        }
    )
    serve.run(assemble(config, FailingReplica), name="failing", route_prefix="/failing")
    service = Service(f"http://127.0.0.1:{cluster}/failing")
    # A fault takes its time to be noticed, and a new replica to start.
    service.http.timeout = 600
    yield service
    serve.delete("failing")


@pytest.mark.parametrize("fault", [HANGS, BREAKS])
def test_a_device_that_hangs_or_breaks_is_replaced_and_its_request_still_gets_its_image(
    failing: Service, fault: str
) -> None:
    reference = failing.draw(PROMPT, seed=3)
    victim = process_of(REPLICA)
    reply = failing.ask(fault, seed=3)
    assert reply.status_code == 200, reply.text
    assert process_of(REPLICA).pid != victim.pid
    # The replica after it draws the same, of this prompt and of others.
    assert np.array_equal(failing.draw(fault, seed=3), pixels_of(reply))
    assert np.array_equal(failing.draw(PROMPT, seed=3), reference)


def test_a_full_device_is_a_503_with_advice_and_the_next_image_is_the_same_bits(failing: Service) -> None:
    reference = failing.draw(PROMPT, lora="demo/sd15-night", seed=4)
    victim = process_of(REPLICA)
    reply = failing.ask(IS_FULL, lora="demo/sd15-night")
    assert (reply.status_code, reply.json()["code"]) == (503, "out_of_memory")
    assert "smaller size or fewer images" in reply.json()["error"]
    assert int(reply.headers["retry-after"]) > 0
    assert np.array_equal(failing.draw(PROMPT, lora="demo/sd15-night", seed=4), reference)
    assert process_of(REPLICA).pid == victim.pid


def quarantine_of(failing: Service, model: str) -> list[dict[str, Any]]:
    (listed,) = [row for row in failing.http.get("/v1/loras").json()["data"] if row["id"] == model]
    return listed["quarantine"]


def test_an_adapter_that_overflows_is_named_then_quarantined_and_the_registry_shows_why(failing: Service) -> None:
    reference = failing.draw(PROMPT, lora="demo/sd15-night", seed=5)
    assert quarantine_of(failing, STYLE) == []
    replies = []
    for _ in range(MAX_FAILURES + 1):
        replies.append(failing.ask(OVERFLOWS, lora=STYLE))
        time.sleep(SAME_PASS_S)  # closer to each other they would count as one
    assert [(reply.status_code, reply.json()["code"]) for reply in replies] == [
        *[(422, "non_finite")] * MAX_FAILURES,
        (422, "quarantined"),
    ]
    assert all(STYLE in reply.json()["error"] for reply in replies)
    assert 0 < int(replies[-1].headers["retry-after"]) <= PERIOD_S

    shown_by = time.monotonic() + SHOWN_WITHIN_S  # replicas are asked at most once a second
    while not (held := quarantine_of(failing, STYLE)):
        assert time.monotonic() < shown_by
    assert held[0]["beside"] == 0
    assert held[0]["reason"].startswith(f"its last {MAX_FAILURES} tries failed: the image")
    assert 0 < held[0]["retry_after_s"] <= PERIOD_S
    alone = failing.http.get(f"/v1/loras/{STYLE}").json()["quarantine"]
    assert [one["replica"] for one in alone] == [held[0]["replica"]]
    # Others are served meanwhile, with the bits that they had before.
    assert np.array_equal(failing.draw(PROMPT, lora="demo/sd15-night", seed=5), reference)
