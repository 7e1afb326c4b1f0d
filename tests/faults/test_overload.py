"""Far more than can be done, all at once: counts of answers, not times, so that a busy machine proves as much."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from itertools import count

import numpy as np
import pytest

from tests.footprint import footprints
from tests.open_loop import Connections, Reply
from tests.service import Service, base_settings, ray_cluster

BASE = "demo/sd15"
PROMPT = "a red circle on a blue background"
REPLICA = {"num_cpus": 0.1, "torch_threads": 1, "max_ongoing_requests": 4, "max_queued_requests": 8}
DEFAULTS = {"steps": 4, "guidance_scale": 3.0, "width": 32, "height": 32}
# Two ingress replicas let 8 wait each, one replica takes 4, and one or two more are on their way between them.
CAPACITY = 20
FLOOD = 20 * CAPACITY
FLOODS = 4
MAX_GROWTH = 1.05
PATIENCE_S = 240.0

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:

    from cluster.local_service import run_service

    with ray_cluster(tmp_path_factory.mktemp("home")) as port:
        config = {
            "bases": [base_settings(BASE, replica=REPLICA, defaults=DEFAULTS)],
            "adapters": {"embedded": True, "hub": {"enabled": False}},
            "ingress": {"replicas": 2, "num_cpus": 0.1},
            "cache_dir": str(tmp_path_factory.mktemp("cache")),
        }
        run_service(config)
        yield Service(f"http://127.0.0.1:{port}")


async def asked(connections: Connections, seed: int) -> Reply:
    return await connections.ask("POST", "/", b'{"inputs":"a star","parameters":{"seed":%d}}' % seed)


async def flood(url: str) -> tuple[list[Reply], list[Reply]]:
    """Ask all at the same moment; return the answers, and those to who asked for the health meanwhile."""
    connections = Connections(url, patience_s=PATIENCE_S)
    crowd = [asyncio.ensure_future(asked(connections, seed)) for seed in range(FLOOD)]
    healths: list[Reply] = []
    while not all(one.done() for one in crowd):
        healths.append(await connections.ask("GET", "/"))
    await connections.close()
    return [one.result() for one in crowd], healths


async def patient(connections: Connections, seed: int) -> int:
    """Ask until served, coming back when told; return how often it took."""
    async with asyncio.timeout(PATIENCE_S):
        for times in count(1):
            reply = await asked(connections, seed)
            if reply.status == 200:
                return times
            assert reply.status == 429
            assert reply.retry_after_s
            await asyncio.sleep(reply.retry_after_s)
    raise AssertionError("a caller who did as told was never served")


def memory_bytes() -> Counter[str]:
    """What the processes take through which requests pass, by kind."""
    taken: Counter[str] = Counter()
    for name, footprint in footprints().items():
        kind = name.split("/")[0]
        if kind in ("proxy", "LoraplexIngress") or kind.startswith("base-"):
            taken[kind] += footprint.memory_bytes
    assert len(taken) == 3
    return taken


def test_under_overload_every_caller_is_served_or_told_when_to_return_and_memory_stays(service: Service) -> None:
    before = service.draw(PROMPT, seed=7)
    after_second: Counter[str] = Counter()
    for turn in range(FLOODS):
        replies, healths = asyncio.run(flood(service.url))
        statuses = Counter(reply.status for reply in replies)
        assert statuses.keys() == {200, 429}
        assert statuses[200] >= CAPACITY / 2
        assert all((reply.retry_after_s or 0) >= 1 for reply in replies if reply.status == 429)
        assert {health.status for health in healths} == {200}
        if turn == 1:
            after_second = memory_bytes()
    grown = {kind: taken / after_second[kind] for kind, taken in memory_bytes().items()}
    assert max(grown.values()) < MAX_GROWTH, grown
    assert np.array_equal(service.draw(PROMPT, seed=7), before)


def test_callers_who_come_back_when_told_are_all_served(service: Service) -> None:
    async def all_patient() -> list[int]:
        connections = Connections(service.url, patience_s=PATIENCE_S)
        times = await asyncio.gather(*(patient(connections, seed) for seed in range(3 * CAPACITY)))
        await connections.close()
        return times

    assert max(asyncio.run(all_patient())) > 1  # else nobody was refused
