"""Aliases, residency and preloads on a running service with two ingress replicas."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import psutil
import pytest

from cluster.local_service import base_handle
from tests.service import BASES, Service, process_of

PROMPT = "a blue square on a red background"
QUICK = {"num_inference_steps": 3}
# Milliseconds where the machine is idle.
SHOWN_EVERYWHERE_S = 60.0
IN_A_ROW = 12


@pytest.fixture
def alias(service: Service) -> Iterator[str]:
    """An alias of a demo adapter, known at every ingress replica."""
    reply = service.http.post("/v1/loras", json={"lora_name": "ours/dusk", "source": {"uri": "demo/sd15-night"}})
    assert reply.status_code == 200, reply.text
    everywhere(lambda: known(service, "ours/dusk"))
    yield "ours/dusk"
    service.http.delete("/v1/loras/ours/dusk")


def known(service: Service, model: str) -> bool:
    return service.http.get(f"/v1/models/{model}").status_code == 200


def everywhere(is_so: Callable[[], bool]) -> None:
    """Wait until a dozen requests in a row, which the two ingress replicas share by chance, find that it is so."""
    ends_at, in_a_row = time.monotonic() + SHOWN_EVERYWHERE_S, 0
    while in_a_row < IN_A_ROW:
        in_a_row = in_a_row + 1 if is_so() else 0
        assert in_a_row or time.monotonic() < ends_at, "a change did not reach every ingress in time"


def row(service: Service, model: str) -> dict[str, Any]:
    (found,) = [one for one in service.http.get("/v1/loras").json()["data"] if one["id"] == model]
    return found


def hits(adapter: str) -> int:
    """Return how often the replica was asked for an adapter, as it says itself at this moment."""
    handle = base_handle("demo/sd15")
    (report,) = handle.broadcast("report").results(timeout_s=SHOWN_EVERYWHERE_S)
    return sum(use.hits for use in report.uses if use.key.startswith(f"{adapter}@"))


def replicas(service: Service) -> list[dict[str, Any]]:
    return service.http.get("/v1/replicas").json()["data"]


def keeper_process() -> psutil.Process:
    return process_of("loraplex:Keeper")


def test_an_alias_draws_what_its_adapter_draws_wherever_it_is_named(service: Service, alias: str) -> None:
    reference = service.draw(PROMPT, model="demo/sd15-night", seed=3, **QUICK)
    assert np.array_equal(service.draw(PROMPT, model=alias, seed=3, **QUICK), reference)
    assert np.array_equal(service.draw(PROMPT, model="demo/sd15", lora=alias, seed=3, **QUICK), reference)
    reply = service.http.post(
        "/v1/images/generations", json={"model": f"demo/sd15:{alias}", "prompt": PROMPT, "seed": 3, **QUICK}
    )
    assert reply.json()["loraplex"]["adapters"][0]["id"] == "demo/sd15-night"


def test_the_list_says_where_an_adapter_is_and_how_often_it_was_asked_for(service: Service, alias: str) -> None:
    # What is shown may be a second old, and older where the replica was late to tell.
    before = hits("demo/sd15-night")
    asked_at = time.time()
    for _ in range(2):
        service.draw(PROMPT, lora=alias, seed=1, **QUICK)
    everywhere(lambda: row(service, alias)["hits"] == before + 2)
    shown = row(service, alias)
    assert (shown["alias_of"], shown["base_model"], shown["rank"] > 0) == ("demo/sd15-night", "demo/sd15", True)
    assert shown["last_used"] >= asked_at - 1
    assert shown["layers_matched"] > 0
    (residence,) = shown["resident"]
    assert residence["tier"] == "applied"
    assert row(service, "demo/sd15-night")["aliases"] == [alias]

    def holder() -> dict[str, Any]:
        (found,) = [one for one in replicas(service) if one["id"] == residence["replica"]]
        return found

    # One that is late to tell is shown as it was, but silent.
    everywhere(lambda: holder()["state"] == "RUNNING")
    assert (holder()["base_model"], holder()["device"]) == ("demo/sd15", "cpu")
    assert [part["id"] for part in holder()["applied"]] == ["demo/sd15-night"]


def test_an_adapter_is_preloaded_before_anybody_asks_and_forgotten_when_told(service: Service) -> None:
    model = "demo/sdxl-stripes"
    # An ingress that has not heard of a replica yet, and to which that is late to answer, would know nobody to ask.
    everywhere(lambda: {one["base_model"] for one in replicas(service) if one["state"] == "RUNNING"} == set(BASES))
    done = service.http.post(f"/v1/loras/{model}/preload", json={"replicas": 1}).json()
    # What replicas told is at most a second old.
    everywhere(lambda: done["replicas"] == [place["replica"] for place in row(service, model)["resident"]])
    gone = service.http.delete(f"/v1/loras/{model}").json()
    assert gone == {"id": model, "object": "lora", "deleted": False, "replicas": done["replicas"]}
    everywhere(lambda: all(place["tier"] == "applied" for place in row(service, model)["resident"]))
    assert service.ask(PROMPT, lora=model, num_inference_steps=1).status_code == 200


@pytest.mark.slow
def test_aliases_outlive_a_keeper_that_is_killed_and_hold_meanwhile(service: Service, alias: str) -> None:
    victim = keeper_process()
    os.kill(victim.pid, signal.SIGKILL)
    for _ in range(IN_A_ROW):
        assert service.ask(PROMPT, lora=alias, num_inference_steps=1).status_code == 200
    body = {"lora_name": "ours/after", "source": {"uri": "demo/sd15-sepia"}}
    ends_at = time.monotonic() + 60
    # Whoever changes something meanwhile is told to come back; the keeper is back within seconds.
    while (reply := service.http.post("/v1/loras", json=body)).status_code != 200:
        assert reply.status_code == 503, reply.text
        assert int(reply.headers["retry-after"]) > 0
        assert time.monotonic() < ends_at
    everywhere(lambda: known(service, "ours/after") and known(service, alias))
    assert keeper_process().pid != victim.pid
    service.http.delete("/v1/loras/ours/after")


@pytest.mark.parametrize(
    ("name", "uri", "status", "code"),
    [
        ("demo/sd15", "demo/sd15-night", 409, "name_taken"),
        ("demo/sd15-sepia", "demo/sd15-night", 409, "name_taken"),
        ("fine", "demo/none", 404, "model_not_found"),
        ("fine", "/etc/passwd", 400, "malformed_request"),
        ("../fine", "demo/sd15-night", 400, "malformed_request"),
    ],
)
def test_an_alias_that_cannot_be_is_refused_at_once(
    service: Service, name: str, uri: str, status: int, code: str
) -> None:
    reply = service.http.post("/v1/loras", json={"lora_name": name, "source": {"uri": uri}})
    assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)
