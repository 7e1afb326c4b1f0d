"""Real Ray, devices that nap by steps, the same traffic twice at once: `python -m tests.bench_turns [--seconds 60]`.

Two applications of two replicas each, one with `step_sharing` and one without, are sent the same requests at the same
times: 1, 2, 4 or 8 images as published, several adapters, about four fifths of what the devices can do. Then one key
floods the first with batch requests, and another key's interactive ones are timed beside it and without it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.replicas.stepping import IMAGE_STEP_S
from tests.service import STYLES, base_settings, ray_cluster

BASE, REPLICAS, STEPS, LOAD = "demo/sd15", 2, 8, 0.8
IMAGES, PARTS = (1, 2, 4, 8), (58, 8, 19, 15)
KEYS = ("one", "many")
FLOOD, TIMED = 150, 40


@dataclass(frozen=True)
class Asked:
    at_s: float
    images: int
    style: str
    seed: int


def drawn(seconds: float, seed: int) -> list[Asked]:
    rng = random.Random(seed)
    image_s = STEPS * IMAGE_STEP_S
    mean = sum(count * part for count, part in zip(IMAGES, PARTS, strict=True)) / sum(PARTS) * image_s
    asked: list[Asked] = []
    at_s = 0.0
    while (at_s := at_s + rng.expovariate(LOAD * REPLICAS / mean)) < seconds:
        (images,) = rng.choices(IMAGES, PARTS)
        asked.append(Asked(at_s, images, rng.choice(STYLES), len(asked)))
    return asked


async def ask(client: httpx.AsyncClient, url: str, one: Asked) -> tuple[int, float]:
    """Return the status and the seconds of one request."""
    body = {
        "model": f"{BASE}-{one.style}", "prompt": "a cat", "n": one.images, "seed": one.seed, "size": "64x64",
        "num_inference_steps": STEPS,
    }  # fmt: skip
    began = time.monotonic()
    reply = await client.post(f"{url}/v1/images/generations", json=body)
    return reply.status_code, time.monotonic() - began


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


async def play(client: httpx.AsyncClient, urls: dict[str, str], asked: list[Asked]) -> dict[str, list[float]]:
    """Send everything to every application at its time; return the seconds of each request."""
    began = time.monotonic()

    async def send(url: str, one: Asked) -> float:
        await asyncio.sleep(max(0.0, began + one.at_s - time.monotonic()))
        status, seconds = await ask(client, url, one)
        assert status == 200, f"{one} was answered {status}"
        return seconds

    calls = {name: [asyncio.create_task(send(url, one)) for one in asked] for name, url in urls.items()}
    return {name: list(await asyncio.gather(*made)) for name, made in calls.items()}


async def mixed(client: httpx.AsyncClient, urls: dict[str, str], asked: list[Asked]) -> None:
    """Play the published mix and print what each discipline makes of it."""
    p95s: list[float] = []
    for name, took in (await play(client, urls, asked)).items():
        by_images = {
            images: [seconds for seconds, one in zip(took, asked, strict=True) if one.images == images]
            for images in IMAGES
        }
        p95s.append(quantile(by_images[1], 0.95))
        sys.stdout.write(
            f"{name}: {len(asked)} requests, p95 {quantile(took, 0.95):.2f} s; one image p95 {p95s[-1]:.2f} s; "
            f"eight images p95 {quantile(by_images[8], 0.95):.2f} s\n"
        )
    sys.stdout.write(f"one image, p95 over that of whole passes: {p95s[0] / p95s[1]:.2f}\n")


async def flooded(client: httpx.AsyncClient, flood: httpx.AsyncClient, url: str) -> None:
    """Time one key's requests alone, and beside a flood of another's; print both."""

    async def timed() -> list[tuple[int, float]]:
        return [await ask(client, url, Asked(0, 1, "night", number)) for number in range(TIMED)]

    alone = [seconds for _, seconds in await timed()]
    asked = [Asked(0, 1, STYLES[number % len(STYLES)], number) for number in range(FLOOD)]
    calls = [asyncio.create_task(ask(flood, url, one)) for one in asked]
    await asyncio.sleep(2.0)
    beside = [seconds for status, seconds in await timed() if status == 200]
    waiting = sum(not call.done() for call in calls)
    statuses = [status for status, _ in await asyncio.gather(*calls)]
    ratio = quantile(beside, 0.95) / quantile(alone, 0.95)
    sys.stdout.write(
        f"beside {FLOOD} batch requests of another key ({statuses.count(200)} drawn, {waiting} left at the end): "
        f"{len(beside)} of {TIMED} answered, p95 {quantile(beside, 0.95):.2f} s, without them "
        f"{quantile(alone, 0.95):.2f} s, ratio {ratio:.2f}\n"
    )


async def measured(port: int, seconds: float, seed: int) -> None:
    urls = {name: f"http://127.0.0.1:{port}/{name}" for name in ("turns", "whole")}
    more: Any = {"timeout": 600, "trust_env": False, "limits": httpx.Limits(max_connections=400)}
    one, many = ({"authorization": f"Bearer {key}"} for key in KEYS)
    async with httpx.AsyncClient(headers=one, **more) as client:
        await play(client, urls, [Asked(0.0, 1, style, 0) for style in STYLES for _ in range(2)])
        await mixed(client, urls, drawn(seconds, seed))
        async with httpx.AsyncClient(headers=many | {"x-priority": "batch"}, **more) as flood:
            await flooded(client, flood, urls["turns"])


def configured(folder: str, *, has_turns: bool) -> dict[str, Any]:
    from serve_app.config import digest_of

    replica = {"num_cpus": 0.1, "torch_threads": 1, "step_sharing": has_turns, "max_queued_requests": 300}
    scaling = {"min_replicas": REPLICAS, "max_replicas": REPLICAS}
    base = base_settings(BASE, autoscaling=scaling, replica=replica)
    return {
        "bases": [base | {"limits": base["limits"] | {"max_images": max(IMAGES)}}],
        "adapters": {"embedded": True, "hub": {"enabled": False}},
        "auth": {"keys": [{"name": key, "sha256": digest_of(key)} for key in KEYS]},
        "ingress": {"num_cpus": 0.1},
        "cache_dir": f"{folder}/{has_turns}",
        "log_level": "WARNING",
    }


def main() -> None:
    """Measure and print."""

    from cluster.local_service import run_service
    from tests.replicas.stepping import SteppingReplica

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ.update({"RAY_worker_niceness": "0"})
    with tempfile.TemporaryDirectory() as folder, ray_cluster(Path(folder)) as port:
        for name, has_turns in (("turns", True), ("whole", False)):
            config = configured(folder, has_turns=has_turns)
            run_service(config, name=name, replica=SteppingReplica)
        sys.stdout.write(f"machine {platform.machine()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}\n")
        asyncio.run(measured(port, options.seconds, options.seed))


if __name__ == "__main__":
    main()
