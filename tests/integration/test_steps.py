"""Requests over HTTP on devices that nap by steps: images in parts, turns of callers, replicas that come and go."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from ray.exceptions import RayActorError

from cluster.local_service import base_handle, delete_service, run_service
from serve_app.config import digest_of
from tests.faults.breaking import until
from tests.replicas.stepping import SteppingReplica, colour_of
from tests.replicas.wrapped import HOLD
from tests.service import base_settings

BASE = "demo/sd15"
ONE, MANY = "key-of-one", "key-of-many"
IMPATIENT, PATIENT = 150, 5
pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]


class Stepping:
    """A service, and what its replicas tell."""

    def __init__(self, port: int, cache: Path, name: str, **scaling: Any) -> None:
        self.url = f"http://127.0.0.1:{port}/{name}"
        self.cache, self.name = cache, name
        config: dict[str, Any] = {
            "bases": [base_settings(BASE, autoscaling=scaling, replica={"num_cpus": 0.1, "torch_threads": 1})],
            "adapters": {"embedded": True, "hub": {"enabled": False}},
            "auth": {"keys": [{"name": name, "sha256": digest_of(name)} for name in (ONE, MANY)]},
            "ingress": {"replicas": 1, "num_cpus": 0.1},  # one that has routed before knows the replicas
            "cache_dir": str(self.cache),
        }
        run_service(config, name=name, replica=SteppingReplica)

    def ask(self, method: str) -> list[Any]:
        """Return what each replica answers."""
        return base_handle(BASE, self.name).broadcast(method).results()

    def told(self) -> dict[int, int]:
        """The steps of each replica, by its process; nothing while one has just ended."""
        with suppress(RayActorError):
            return dict(self.ask("told"))
        return {}

    def accepted(self) -> list[int]:
        """The requests that each replica has taken."""
        return [state.waiting + state.running for state in self.ask("state")]

    def residents(self) -> list[frozenset[str]]:
        """The adapters in host memory, replica by replica."""
        return [frozenset(held.id for held in report.holdings) for report in self.ask("report")]

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold every device before its next step."""
        (self.cache / HOLD).touch()
        try:
            yield
        finally:
            (self.cache / HOLD).unlink()

    def client(self, key: str, **more: str) -> httpx.AsyncClient:
        headers = {"authorization": f"Bearer {key}", **more}
        return httpx.AsyncClient(headers=headers, timeout=300, trust_env=False)

    async def known(self, client: httpx.AsyncClient) -> dict[int, int]:
        """Draw until the router knows the replicas, and each replica its pace: its guess weighs nothing then.

        Return the steps of each replica.
        """
        now = first = await asyncio.to_thread(self.told)
        while any(now[pid] - first[pid] < 24 for pid in first):
            await asyncio.gather(*(self.draw(client, seed, num_inference_steps=12) for seed in range(4)))
            now = await asyncio.to_thread(self.told)
        return now

    async def draw(self, client: httpx.AsyncClient, seed: int, **changes: Any) -> httpx.Response:
        body = {"prompt": "a cat", "seed": seed, "size": "64x64", "num_inference_steps": 4, **changes}
        return await client.post(f"{self.url}/v1/images/generations", json=body)


@pytest.fixture(scope="module")
def stepping(cluster: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stepping]:
    yield Stepping(cluster, tmp_path_factory.mktemp("cache"), "steps", min_replicas=2, max_replicas=2)
    delete_service("steps")


@pytest.fixture
def growing(cluster: int, tmp_path: Path) -> Iterator[Stepping]:
    """A service that starts a second replica where more than two requests are on the one."""
    scaling = {"policy": "ray", "target_ongoing_requests": 2.0, "look_back_period_s": 1.0}
    yield Stepping(cluster, tmp_path, "growing", min_replicas=1, max_replicas=2, **scaling)
    delete_service("growing")


def colours(images: list[dict[str, Any]]) -> list[Any]:
    return [Image.open(io.BytesIO(base64.b64decode(image["b64_json"]))).getpixel((5, 5)) for image in images]


async def test_a_request_s_images_are_drawn_on_every_replica_and_come_in_order(stepping: Stepping) -> None:
    async with stepping.client(ONE) as client:
        before = await stepping.known(client)
        # So long that what the replicas last said of themselves, a quarter of a second ago, weighs nothing.
        reply = await stepping.draw(client, 300, n=4, num_inference_steps=40)
        assert colours(reply.json()["data"]) == [colour_of(seed) for seed in range(300, 304)]
        after = await asyncio.to_thread(stepping.told)
        assert [after[pid] - before[pid] for pid in before] == [40, 40]
        body = {"prompt": "a cat", "seed": 500, "n": 4, "size": "64x64", "num_inference_steps": 40, "stream": True}
        async with client.stream("POST", f"{stepping.url}/v1/images/generations", json=body) as stream:
            events = [json.loads(line[6:]) async for line in stream.aiter_lines() if line.startswith("data: {")]
    steps = [event["step"] for event in events if "step" in event]
    assert steps == sorted(steps)
    assert steps.count(2) == 1, "both parts tell their progress as one"
    assert colours([event for event in events if "b64_json" in event]) == [colour_of(seed) for seed in range(500, 504)]


async def test_one_key_s_impatient_requests_leave_places_and_turns_to_another_key(stepping: Stepping) -> None:
    async with stepping.client(MANY, **{"x-priority": "batch"}) as many, stepping.client(ONE) as one:
        flood = [asyncio.create_task(stepping.draw(many, seed)) for seed in range(IMPATIENT)]
        await asyncio.wait(flood, return_when=asyncio.FIRST_COMPLETED)
        replies = [await stepping.draw(one, seed) for seed in range(PATIENT)]
        assert [reply.status_code for reply in replies] == [200] * PATIENT
        assert not all(call.done() for call in flood), "they took their turns while others waited"
        statuses = [(await call).status_code for call in flood]
    assert set(statuses) <= {200, 429}
    assert statuses.count(200) >= 64


async def test_a_burst_for_one_adapter_spills_over_to_replicas_without_it(stepping: Stepping) -> None:
    async with stepping.client(ONE) as client:
        for style in ("night", "sepia", "sketch", "stripes"):
            reply = await stepping.draw(client, 0, model=f"{BASE}-{style}", num_inference_steps=2)
            assert reply.status_code == 200, reply.text
        assert len(frozenset.union(*(await asyncio.to_thread(stepping.residents)))) == 4

        # Serve's own multiplexed router would wait for the one replica that holds it: it takes 16 requests at once.
        burst = [stepping.draw(client, seed, model=f"{BASE}-night", num_inference_steps=40) for seed in range(10)]
        assert {reply.status_code for reply in await asyncio.gather(*burst)} == {200}
    assert len(frozenset.intersection(*(await asyncio.to_thread(stepping.residents)))) >= 1


async def test_a_part_whose_replica_is_killed_is_drawn_again_alone(stepping: Stepping) -> None:
    async with stepping.client(ONE) as client:
        before = await stepping.known(client)
        call = asyncio.create_task(stepping.draw(client, 700, n=4, num_inference_steps=50))
        await asyncio.to_thread(
            until,
            lambda: len(now := stepping.told()) == 2 and all(now[pid] > steps + 1 for pid, steps in before.items()),
            "both parts begun",
        )
        victim, survivor = before
        os.kill(victim, signal.SIGKILL)
        reply = await call
    assert reply.status_code == 200, reply.text
    assert colours(reply.json()["data"]) == [colour_of(seed) for seed in range(700, 704)]
    # Its own part once, and the lost one at most.
    await asyncio.to_thread(until, lambda: survivor in stepping.told(), "word of the replicas")
    assert (await asyncio.to_thread(stepping.told))[survivor] - before[survivor] <= 100


async def test_when_a_replica_joins_the_others_give_back_what_has_not_begun(growing: Stepping) -> None:
    async with growing.client(ONE) as client:
        with growing.held():
            calls = [asyncio.create_task(growing.draw(client, 900 + number)) for number in range(12)]
            await asyncio.to_thread(until, lambda: growing.accepted() == [12], "all requests on the one replica")
            await asyncio.to_thread(
                until, lambda: len(growing.accepted()) == 2 and all(growing.accepted()), "some on the other"
            )
        replies = await asyncio.gather(*calls)
    assert [colours(reply.json()["data"]) for reply in replies] == [[colour_of(900 + number)] for number in range(12)]
    assert all((await asyncio.to_thread(growing.told)).values())
