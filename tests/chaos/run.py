"""A chaos run: callers, blows and a troubled Hub at once, over a cluster of several nodes on this machine.

The service is first asked for every picture while nothing disturbs it, one at a time and with embedded adapters alone:
those are the references.
"""

from __future__ import annotations

import asyncio
import os
import platform
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cluster.local_cluster import LocalCluster, NodeShape, local_cluster
from serve_app.environment import launch_environment
from tests.chaos.blows import INGRESS_DEPLOYMENT, Blow, Breaker
from tests.chaos.caller import OPENAI, RAW, STREAM, BatchOutput, Caller, Pixels, Refused, new_caller
from tests.chaos.hub_trouble import HubTrouble, known_id
from tests.chaos.pictures import Picture, all_pictures
from tests.chaos.report import ANSWERED, FAILED, HUNG, RETRYABLE, WRONG, Report, Told
from tests.hub_server import HubServer
from tests.service import BASES

NODES, REPLICAS, INGRESSES, CALLERS = 3, 2, 3, 4
# What is in flight when something is killed is at risk, and a machine without a free core takes long over each.
PAUSE_S = (0.2, 0.8)
# Each replica takes a place: when a node is lost, the others have room for what was on it.
SHAPE = NodeShape(cpus=2, resources={"place": 2})
SHAPE_WEIGHTS = {RAW: 45, OPENAI: 35, STREAM: 20}
# Where an adapter comes from.
EMBEDDED_SHARE, NEW_SHARE = 0.4, 0.03
ASK_AGAIN_TIMES, ASK_AGAIN_PAUSE_S = 10, 1.0
REPORT_LAG_S = 300.0


@dataclass(frozen=True, slots=True)
class Least:
    """What a run on a slow machine goes on for beyond its time, `within_minutes` in all."""

    requests: int = 0
    blows: int = 0
    kinds: frozenset[str] = frozenset()
    troubles: int = 0
    within_minutes: float = 0.0

    def is_met(self, requests: int, blows: Sequence[Blow], troubles: int) -> bool:
        """Say whether it was chaos enough."""
        has_struck = len(blows) >= self.blows and self.kinds <= {blow.kind for blow in blows}
        return requests >= self.requests and has_struck and troubles >= self.troubles


NO_LEAST = Least()


def config(endpoint: str, cache: Path) -> dict[str, Any]:
    """Return a service of two bases with two replicas each; its caches hold a part of what is asked for."""
    bases = [
        {
            "id": base,
            "source": {"embedded": base},
            "defaults": {"steps": 3, "guidance_scale": 3.0, "width": 32, "height": 32},
            "limits": {"min_side": 32, "max_side": 64, "max_pixels": 4096, "max_steps": 8},
            "replica": {
                "num_cpus": 0.2,
                "torch_threads": 1,
                "resources": {"place": 1},
                "host_cache": "1MB",
                "health_check_period_s": 2,
            },
            "autoscaling": {"policy": "ray", "min_replicas": REPLICAS, "max_replicas": REPLICAS},
        }
        for base in BASES
    ]
    return {
        "bases": bases,
        "adapters": {
            "embedded": True,
            "hub": {"endpoint": endpoint, "timeout_s": 20.0, "cache_size": "2MB"},
            "sharing": {"enabled": True, "memory": "2MB", "disk": "2MB"},
        },
        "ingress": {"replicas": INGRESSES, "num_cpus": 0.1, "health_check_period_s": 2},
        "cache_dir": str(cache / "{node}"),
        "disk_cache": "3MB",
    }


@dataclass
class Callers:
    """Callers that ask for one picture after another, and compare what they get."""

    url: str
    references: dict[Picture, tuple[Pixels, ...]]
    trouble: HubTrouble
    rng: random.Random
    is_over: Callable[[int], bool]

    async def ask_all(self) -> tuple[list[Told], int, int]:
        """Ask until it is over; return what came of it, and how often connections were refused and lost."""
        told: list[Told] = []
        async with new_caller(self.url) as caller:
            await asyncio.gather(*(self._ask_on(caller, told) for _ in range(CALLERS)))
        return told, caller.turned_away, caller.sent_again

    async def _ask_on(self, caller: Caller, told: list[Told]) -> None:
        pictures = list(self.references)
        while not self.is_over(len(told)):
            picture = self.rng.choice(pictures)
            shape = self.rng.choices(list(SHAPE_WEIGHTS), weights=list(SHAPE_WEIGHTS.values()))[0]
            told.append(await self._ask(caller, picture, shape, self._adapter(picture)))
            await asyncio.sleep(self.rng.uniform(*PAUSE_S))

    async def _ask(self, caller: Caller, picture: Picture, shape: str, adapter: str | None) -> Told:
        began = time.monotonic()
        outcome, what, drawn = await self._once(caller, picture, shape, adapter)
        ended = time.monotonic()
        again = await self._again(caller, picture, shape, adapter) if outcome == RETRYABLE else 0
        images = len(drawn.images) if drawn else 0
        is_exact = drawn is not None and drawn.batch_size == 1
        return Told(outcome, shape, what, began, ended, images, is_exact, again)

    async def _once(
        self, caller: Caller, picture: Picture, shape: str, adapter: str | None
    ) -> tuple[str, str, BatchOutput | None]:
        try:
            drawn = await caller.draw(picture, shape, adapter)
        except Refused as refused:
            return RETRYABLE if refused.is_retryable else FAILED, refused.what, None
        except TimeoutError:
            return HUNG, "no answer", None
        difference = self._difference(picture, drawn)
        if difference > (0 if drawn.batch_size == 1 else 1):
            return WRONG, f"off by {difference} levels, batch {drawn.batch_size}", drawn
        return ANSWERED, "", drawn

    async def _again(self, caller: Caller, picture: Picture, shape: str, adapter: str | None) -> int:
        """Return after how many further tries a lost request was answered, -1 for never."""
        for times in range(1, ASK_AGAIN_TIMES + 1):
            await asyncio.sleep(ASK_AGAIN_PAUSE_S)
            outcome, _, _ = await self._once(caller, picture, shape, adapter)
            if outcome == ANSWERED:
                return times
            if outcome != RETRYABLE:
                break
        return -1

    def _difference(self, picture: Picture, drawn: BatchOutput) -> int:
        pairs = zip(drawn.images, self.references[picture], strict=False)
        return max(int(np.abs(image.astype(int) - reference).max()) for image, reference in pairs)

    def _adapter(self, picture: Picture) -> str | None:
        if picture.adapter is None:
            return None
        chance = self.rng.random()
        if chance < NEW_SHARE:
            return self.trouble.new_id(picture.adapter)
        return picture.adapter if chance < NEW_SHARE + EMBEDDED_SHARE else known_id(picture.adapter)


async def draw_references(url: str, pictures: list[Picture]) -> dict[Picture, tuple[Pixels, ...]]:
    """Return every picture as the undisturbed service draws it, each image by itself."""
    references: dict[Picture, tuple[Pixels, ...]] = {}
    async with new_caller(url) as caller:
        for picture in pictures:
            seeds = range(picture.seed, picture.seed + picture.count)
            alone = [replace(picture, seed=seed, count=1) for seed in seeds]
            drawn = [await caller.draw(one, RAW, one.adapter) for one in alone]
            assert all(one.batch_size == 1 for one in drawn)
            references[picture] = tuple(one.images[0] for one in drawn)
    return references


def chaos(minutes: float, seed: int, *, say: Callable[[str], None], cache: Path, at_least: Least = NO_LEAST) -> Report:
    """Run it all and return the report; for the main thread, since Ray starts nodes in no other."""
    with ExitStack() as stack:
        hub = stack.enter_context(HubServer())
        cluster = stack.enter_context(_cluster())
        say(f"{NODES} nodes run; deploying")
        _deploy(config(hub.endpoint, cache))
        wanted = {f"base-{base.replace('/', '--')}": REPLICAS for base in BASES} | {INGRESS_DEPLOYMENT: INGRESSES}
        breaker = Breaker(cluster, SHAPE, NODES, wanted, random.Random(seed + 1))
        assert breaker.settle(REPORT_LAG_S), "the service did not start whole"
        began = time.monotonic()
        references = asyncio.run(draw_references(cluster.url, all_pictures(seed)))
        say(f"{len(references)} references drawn in {time.monotonic() - began:.0f} s; it begins")
        trouble = HubTrouble(hub, random.Random(seed))
        began = time.monotonic()

        def is_over(requests: int) -> bool:
            minutes_so_far = (time.monotonic() - began) / 60
            has_enough = at_least.is_met(requests, breaker.blows, sum(trouble.troubles.values()))
            return minutes_so_far > minutes and (has_enough or minutes_so_far > at_least.within_minutes)

        callers = Callers(cluster.url, references, trouble, random.Random(seed + 2), is_over)
        return _run(seed, callers, breaker, trouble)


def _run(seed: int, callers: Callers, breaker: Breaker, trouble: HubTrouble) -> Report:
    began = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        asking = pool.submit(lambda: asyncio.run(callers.ask_all()))
        asking.add_done_callback(lambda _: breaker.is_over.set())
        asking.add_done_callback(lambda _: trouble.is_over.set())
        troubling = pool.submit(trouble.run)
        breaker.run()
        troubling.result()
        told, turned_away, sent_again = asking.result()
    took_s = time.monotonic() - began
    return Report(
        seconds=took_s,
        seed=seed,
        told=tuple(told),
        blows=tuple(breaker.blows),
        is_whole=breaker.settle(REPORT_LAG_S),
        turned_away=turned_away,
        sent_again=sent_again,
        hub=dict(trouble.troubles),
        hub_requests=len(trouble.hub.requests),
        new_adapters=len(trouble.new),
        machine=f"{os.cpu_count()} cores, {platform.machine()}, load average {os.getloadavg()[1]:.0f}",
    )


@contextmanager
def _cluster() -> Iterator[LocalCluster]:
    before = dict(os.environ)
    os.environ.update(launch_environment())
    try:
        with local_cluster(NODES, SHAPE, proxies="EveryNode") as cluster:
            yield cluster
    finally:
        os.environ.clear()
        os.environ.update(before)


def _deploy(arguments: dict[str, Any]) -> None:
    from cluster.local_service import run_service

    run_service(arguments)
