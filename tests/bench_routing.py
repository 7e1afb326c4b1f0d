"""What routing gains on real Ray, and what it costs; by hand, not by CI.

    python -m tests.bench_routing decisions      how long one decision takes
    python -m tests.bench_routing day            the calibrated day, compressed, under several routers at once

`day` sends the same requests at the same times to applications that differ in their router alone: three replicas each,
whose generations are sleeps (`tests.replicas.sleeping`), so that processors do not decide. "Late" is what a service
does without fetching at admission: the replica gets a request's adapters when its turn comes.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from serve_app.bench.traffic.workload import TRAFFICS, Arrival, generate
from serve_app.core import AdapterSpec, GenerationRequest, ScaledAdapter
from serve_app.engine.worker.scheduling import QueuePolicy
from serve_app.routing import stats
from serve_app.routing.cost import RequestLoad, RequiredAdapter, rank
from serve_app.routing.fleet import ReplicaStates
from serve_app.routing.stats import ReplicaStats, encode
from serve_app.work import LatencyModel, work_units
from tests.replicas.sleeping import LeastLoadedRouter, SleepingReplica, Sleeps, Slept
from tests.service import ray_cluster

REPLICAS = 3
# The calibrated day's constants, in seconds of the day: one image, a swap, a fetch. A tenth of an image is not steps.
IMAGE_S, SWAP_S, FETCH_S, FIXED_SHARE = 8.5, 0.03, 1.5, 0.1
FILE_BYTES = 64_000
OURS, LEAST, LATE, RAYS = "ours", "least loaded", "least loaded, late", "Ray's, multiplexed"
POW_2 = "Ray's, without ids"
POLICIES = {OURS: "ours", LEAST: "least-loaded", LATE: "least-late", RAYS: "multiplexed", POW_2: "pow-2"}


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


@dataclass(frozen=True)
class Outcome:
    """One request under one router."""

    latency_s: float
    fetches: int
    is_swapped: bool


def decisions(replicas: int, adapters: int, count: int) -> None:
    """Time what the router does for one request: read the news of one replica, rank all, book."""
    rng = random.Random(0)
    keys = [f"acme/adapter-{index:04d}@0123456789abcdef/adapter.safetensors" for index in range(adapters)]
    now_s = time.monotonic()
    pace = LatencyModel(0.8, 0.12)
    held = [frozenset(rng.sample(keys, 64)) for _ in range(replicas)]
    wires = [encode(ReplicaStats(1, rng.random() * 30, pace)) for _ in range(replicas)]
    states = ReplicaStates()
    walls, cpus = [], []
    for number in range(count):
        needs = tuple(RequiredAdapter(key, 10**8) for key in rng.sample(keys, rng.choice((1, 1, 1, 2))))
        now_s += 0.1
        # One replica has news: its work, and one adapter that came for another.
        index = rng.randrange(replicas)
        held[index] = frozenset([*list(held[index])[1:], rng.choice(keys)])
        wires[index] = encode(ReplicaStats(number + 2, rng.random() * 30, pace))
        wall_s, cpu_s = time.perf_counter(), time.thread_time()
        for replica, (wire, has) in enumerate(zip(wires, held, strict=True)):
            states.update(f"r{replica}", wire, has, now_s)
        load = RequestLoad(needs, 60.0)
        order = rank(load, states.views(now_s), rng=rng)
        states.send(order[0], str(number), str(number), load, now_s)
        states.accept(order[0], str(number))
        cpus.append(time.thread_time() - cpu_s)
        walls.append(time.perf_counter() - wall_s)
        if number >= 200:
            states.withdraw(str(number - 200))
    say(f"{count} decisions over {replicas} replicas and {adapters} adapters, 64 of them on each replica")
    _say_times("a decision, wall", walls)
    _say_times("a decision, processor", cpus)
    _say_times("empty loops as long, processor", _loops(len(cpus), statistics.median(cpus)))


def _loops(count: int, seconds: float) -> list[float]:
    """Time loops that take `seconds` each at the median: how much the machine itself makes equal work differ."""
    turns, times = 1000, [0.0]
    while statistics.median(times) < seconds:
        turns = int(turns * 1.2)
        times = [_loop_s(turns) for _ in range(21)]
    return [_loop_s(turns) for _ in range(count)]


def _loop_s(turns: int) -> float:
    began_s, total = time.thread_time(), 0
    for turn in range(turns):
        total += turn
    return time.thread_time() - began_s


def _say_times(what: str, times: list[float]) -> None:
    times.sort()
    say(f"  {what:31}: p50 {_at(times, 0.5) * 1e6:6.0f} us, p99 {_at(times, 0.99) * 1e6:6.0f} us")


@dataclass(frozen=True)
class Day:
    """The calibrated day of one seed, `factor` times as fast, or a stretch of it and what warms up before."""

    arrivals: tuple[Arrival, ...]
    factor: float
    warm_up: tuple[Arrival, ...] = ()

    @property
    def duration_s(self) -> float:
        return self.arrivals[-1].at_s


def drawn_day(seed: int) -> tuple[Arrival, ...]:
    """Draw a day of one image a request."""
    return generate(replace(TRAFFICS["day"], images=((1, 1.0),), steps=((30, 1.0),)), seed).arrivals


def stretch(seed: int, *, warm_up: int, requests: int, factor: float) -> Day:
    """Cut out of a day the stretch whose density is the median of all of its length."""
    drawn = drawn_day(seed)
    starts = range(warm_up, len(drawn) - requests)
    by_length = sorted(starts, key=lambda start: drawn[start + requests].at_s - drawn[start].at_s)
    first = by_length[len(by_length) // 2]
    began_s = drawn[first].at_s
    measured = tuple(replace(one, at_s=(one.at_s - began_s) / factor) for one in drawn[first : first + requests])
    return Day(measured, factor, drawn[first - warm_up : first])


def compressed(seed: int, *, longest_gap_s: float, factor: float) -> Day:
    """Take a whole day; a gap between two arrivals that is longer than `longest_gap_s` is cut to it.

    In the 15 s of the default nearly everything that was asked for ends, so that nothing would come of more: simulated
    with and without the cut, no router's p95 differs by more than 1.5%.
    """
    drawn = drawn_day(seed)
    gaps_s = (min(after.at_s - before.at_s, longest_gap_s) for before, after in itertools.pairwise(drawn))
    times_s = itertools.accumulate(gaps_s, initial=0.0)
    return Day(tuple(replace(one, at_s=at_s / factor) for one, at_s in zip(drawn, times_s, strict=True)), factor)


def request_of(arrival: Arrival, number: int, seed: int = 0) -> GenerationRequest:
    # Every seed has adapters of its own, so that none is warm from the seed before.
    uses = tuple(
        ScaledAdapter(
            AdapterSpec(f"seed-{seed}/{ask.key}", "sleeping", "0" * 16, "adapter.bin", "folder", "", FILE_BYTES),
            ask.scale,
        )
        for ask in arrival.adapters
    )
    return GenerationRequest(
        f"r{number}", "sleeping", "", None, uses, arrival.width, arrival.height, arrival.steps,
        arrival.guidance_scale, None, number, arrival.images,
    )  # fmt: skip


def sleeps_of(factor: float, host_adapters: int) -> Sleeps:
    units = work_units(request_of(Arrival(0.0, "sleeping", ()), 0))
    unit_s = IMAGE_S * (1 - FIXED_SHARE) / units
    pace = LatencyModel(IMAGE_S * FIXED_SHARE / factor, unit_s / factor)
    policy = QueuePolicy(max_overtakes=4, max_overtaken_s=5.0 / factor)
    times_s = SWAP_S / factor, FETCH_S / factor
    return Sleeps(pace, *times_s, host_adapters, FILE_BYTES, 4, policy, grain_s=stats.GRAIN_S / factor)


def name_of(policy: str, seed: int) -> str:
    return f"{POLICIES[policy]}-{seed}"


def start(policy: str, seed: int, sleeps: Sleeps, folder: Path) -> None:
    """Start one application."""
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    from serve_app.config import AppConfig
    from serve_app.routing.router import router_config

    options: dict[str, Any] = {}
    if policy == OURS:
        bases = [{"id": "sleeping", "source": {"embedded": "demo/sd15"}, "router": {"stats_period_s": 0.1}}]
        config = AppConfig.model_validate({"bases": bases, "disk_cache": 0})
        options["request_router_config"] = router_config(config.bases[0])
    elif policy in (LEAST, LATE):
        options["request_router_config"] = RequestRouterConfig(request_router_class=LeastLoadedRouter)  # type: ignore[arg-type]
    app = SleepingReplica.options(
        name="sleeping", num_replicas=REPLICAS, max_ongoing_requests=16, ray_actor_options={"num_cpus": 0.01}, **options
    ).bind(replace(sleeps, is_fetching_late=policy == LATE), folder)
    serve.run(app, name=name_of(policy, seed), route_prefix=None)


async def ask(policy: str, handle: Any, request: GenerationRequest) -> Outcome:
    key = request.adapters[0].spec.key if request.adapters and policy in (OURS, RAYS) else ""
    began_s = time.perf_counter()
    slept: Slept = await handle.options(multiplexed_model_id=key).generate.remote(request)
    return Outcome(time.perf_counter() - began_s, slept.fetches, slept.is_swapped)


async def replay(policy: str, handle: Any, day: Day, seed: int) -> list[Outcome]:
    """Send the day to one application: first what warms it up, four at a time, then each request at its time."""
    gate = asyncio.Semaphore(4)

    async def warm(number: int, arrival: Arrival) -> None:
        async with gate:
            # Next to no work: what is warmed up is the tiers.
            await ask(policy, handle, replace(request_of(arrival, number, seed), steps=1))

    await asyncio.gather(*(warm(number, arrival) for number, arrival in enumerate(day.warm_up)))
    await asyncio.sleep(1.0)
    loop = asyncio.get_running_loop()
    began_s = loop.time()

    async def at_its_time(number: int, arrival: Arrival) -> Outcome:
        await asyncio.sleep(max(began_s + arrival.at_s - loop.time(), 0.0))
        return await ask(policy, handle, request_of(arrival, number, seed))

    return await asyncio.gather(*(at_its_time(number, arrival) for number, arrival in enumerate(day.arrivals)))


def day(options: argparse.Namespace) -> None:
    """Compare routers over several seeds, all of them at the same time, each with replicas of its own."""
    import ray

    sleeps = sleeps_of(options.factor, options.host)
    days = {
        seed: compressed(seed, longest_gap_s=options.longest_gap, factor=options.factor)
        if options.requests is None
        else stretch(seed, warm_up=options.warm_up, requests=options.requests, factor=options.factor)
        for seed in options.seeds
    }
    say(f"about {max(one.duration_s for one in days.values()) / 60:.0f} minutes")
    outcomes: dict[str, list[list[Outcome]]] = {policy: [] for policy in options.policies}
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / "adapters"
        folder.mkdir()
        (folder / "adapter.bin").write_bytes(random.Random(0).randbytes(FILE_BYTES))
        with ray_cluster(Path(home)):
            for seed, policy in itertools.product(options.seeds, options.policies):
                start(policy, seed, sleeps, folder)
            # A process for each seed sends, so that no sender is late for another seed's sake.
            # None is used twice: it changes what its routers count.
            sender = ray.remote(num_cpus=0, max_calls=1)(play)
            sent = {seed: sender.remote(options.policies, one, seed) for seed, one in days.items()}
            for seed, reference in sent.items():
                for policy, got in ray.get(reference).items():
                    outcomes[policy].append(got)
                    say(f"seed {seed}, {policy:20}: {_line(got, options.factor)}")
    report(outcomes, options)


def play(policies: Sequence[str], day: Day, seed: int) -> dict[str, list[Outcome]]:
    """Send the same day to every router's application of a seed at the same times."""
    from ray import serve

    from serve_app.routing import cost

    # This process routes: what a fetch and a swap count is in seconds of the day, too. The day's adapters have 100 MB,
    # for which production counts its fetch; the files here are small.
    counts_s = {"FETCH_S": FETCH_S, "FETCH_BYTE_S": 0.0, "SWAP_S": cost.SWAP_S, "TIE_S": cost.TIE_S}
    for name, count_s in counts_s.items():
        setattr(cost, name, count_s / day.factor)
    handles = {policy: serve.get_app_handle(name_of(policy, seed)) for policy in policies}

    async def all_at_once() -> dict[str, list[Outcome]]:
        got = await asyncio.gather(*(replay(policy, handle, day, seed) for policy, handle in handles.items()))
        return dict(zip(handles, got, strict=True))

    return asyncio.run(all_at_once())


def report(outcomes: dict[str, list[list[Outcome]]], options: argparse.Namespace) -> None:
    say(
        f"\n{options.factor:g} times as fast, told in seconds of the day; "
        f"{len(options.seeds)} seeds of {len(outcomes[OURS][0])} requests"
    )
    pooled = {policy: [outcome for seed in seeds for outcome in seed] for policy, seeds in outcomes.items()}
    for policy, got in pooled.items():
        say(f"  {policy:20}: {_line(got, options.factor)}")
    for other in (policy for policy in pooled if policy != OURS):
        ratios = [_p95(mine) / _p95(theirs) for mine, theirs in zip(outcomes[OURS], outcomes[other], strict=True)]
        fetches = _fetches(pooled[OURS]) / max(_fetches(pooled[other]), 1e-9)
        say(
            f"  ours against {other}: p95 {_p95(pooled[OURS]) / _p95(pooled[other]) - 1:+.1%} pooled, seeds "
            f"{' '.join(f'{ratio - 1:+.1%}' for ratio in ratios)}; fetches a request {fetches:.2f} times"
        )
    if options.json:
        options.json.write_text(
            json.dumps({name: [[vars(o) for o in seed] for seed in seeds] for name, seeds in outcomes.items()})
        )


def _line(got: Sequence[Outcome], factor: float) -> str:
    latencies = sorted(outcome.latency_s * factor for outcome in got)
    swaps = statistics.mean(outcome.is_swapped for outcome in got)
    return (
        f"p50 {_at(latencies, 0.5):5.1f}  p95 {_at(latencies, 0.95):5.1f}  p99 {_at(latencies, 0.99):5.1f}  "
        f"mean {statistics.mean(latencies):5.1f}  fetches {_fetches(got):.3f}  swaps {swaps:.2f}"
    )


def _fetches(got: Sequence[Outcome]) -> float:
    return statistics.mean(outcome.fetches for outcome in got)


def _p95(got: Sequence[Outcome]) -> float:
    return _at(sorted(outcome.latency_s for outcome in got), 0.95)


def _at(ordered: Sequence[float], share: float) -> float:
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    timing = commands.add_parser("decisions")
    timing.add_argument("--replicas", type=int, default=100)
    timing.add_argument("--adapters", type=int, default=1000)
    timing.add_argument("--count", type=int, default=5000)
    comparing = commands.add_parser("day")
    comparing.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    comparing.add_argument("--requests", type=int, help="a stretch of so many of each day, not the whole")
    comparing.add_argument("--warm-up", type=int, default=300, help="requests before the stretch that warm the tiers")
    comparing.add_argument("--longest-gap", type=float, default=15.0, help="seconds of the day; longer ones are cut")
    comparing.add_argument("--factor", type=float, default=20.0, help="how many times faster than the day")
    comparing.add_argument("--host", type=int, default=64, help="adapters in a replica's host memory")
    comparing.add_argument("--policies", nargs="+", default=[OURS, LEAST, RAYS], choices=list(POLICIES))
    comparing.add_argument("--json", type=Path)
    options = parser.parse_args()
    say(f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}, Python {sys.version.split()[0]}")
    if options.command == "decisions":
        decisions(options.replicas, options.adapters, options.count)
    else:
        day(options)


if __name__ == "__main__":
    main()
