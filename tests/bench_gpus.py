"""Bases of the published popularity on fewer GPUs, simulated: `python -m tests.bench_gpus [bases] [gpus] [requests]`.

Production's policies, one for each base, share the GPUs over the busy part of a day. Beside them stands the best of the
placements that never change: each base pinned to one GPU, chosen by all the work of the day. With `--ray SECONDS`
eight bases that sleep are asked for so long on real Ray, on four pretended GPUs.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import tempfile
import time
from pathlib import Path

from serve_app.autoscaling.sharing import longest_wait
from serve_app.bench.simulation.gpus import ROUND_S, Call, GpuSimulation, Outcome, Sharing, pinned
from serve_app.bench.simulation.profile import read_profile
from serve_app.bench.traffic.workload import Traffic, generate
from serve_app.bench.traffic.workload_statistics import quantile
from serve_app.work import image_units, usual_runs

# A published trace: 86 bases, of which the most popular one has 31% of the requests.
TRACE_BASES, TOP_SHARE = 86, 0.31
FROM_S, UNTIL_S = 9 * 3600.0, 18 * 3600.0
PATIENCES_S = (0.0, 15.0, 30.0, 60.0, 120.0, 240.0, 480.0)


def popularity(count: int) -> list[float]:
    """Return the weights of the first bases of the trace, by the Zipf exponent that gives the first its share."""
    low, high = 0.5, 3.0
    for _ in range(50):
        middle = (low + high) / 2
        is_flat = 1 / sum(rank**-middle for rank in range(1, TRACE_BASES + 1)) < TOP_SHARE
        low, high = (middle, high) if is_flat else (low, middle)
    return [rank**-low for rank in range(1, count + 1)]


def day(bases: int, requests: int, seed: int) -> list[Call]:
    """Return the calls from nine to six of the calibrated day, over these bases; 8.5 s for the mean request."""
    named = tuple((f"base-{number:02d}", weight) for number, weight in enumerate(popularity(bases)))
    workload = generate(Traffic(bases=named).scaled(requests, 640), seed)
    pace = read_profile("mixed").base("*").pace
    calls: list[Call] = []
    for one in workload.arrivals:
        units = one.images * image_units(one.steps, usual_runs(one.guidance_scale), one.width, one.height)
        if FROM_S <= one.at_s < UNTIL_S:
            calls.append(Call(one.at_s - FROM_S, one.base_id, pace.seconds(units)))
    return calls


def line(name: str, latencies_s: list[float]) -> str:
    """Return what is printed of latencies."""
    ordered = sorted(latencies_s)
    return (
        f"  {name}: latency p50 {quantile(ordered, 0.5):.1f}, p95 {quantile(ordered, 0.95):.1f}, "
        f"p99 {quantile(ordered, 0.99):.1f}, most {ordered[-1]:.0f} s"
    )


def told(outcome: Outcome, limit_s: float) -> str:
    """Return what is printed of waits and starts; `limit_s` is the bound, with the longest drain that there was."""
    waits, hours = sorted(outcome.waits_s), outcome.lasted_s / 3600
    return (
        f"    {len(waits)} waits of a base for a replica: p50 {quantile(waits, 0.5):.1f}, "
        f"p95 {quantile(waits, 0.95):.1f}, longest {waits[-1]:.1f} of at most {limit_s:.0f} s; "
        f"{outcome.starts / hours:.1f} starts an hour, "
        f"{outcome.back / hours:.1f} of a base that left within 10 minutes before, "
        f"{outcome.taken / hours:.1f} replicas taken"
    )


async def ask_on_ray(seconds: float, start_s: float, each_s: float = 1.0) -> list[float]:
    """Return how long requests took that came every second by chance, for bases by their popularity."""
    from tests.replicas.shared_gpus import sleeping_bases
    from tests.replicas.sleeper import sleeping_request

    rng = random.Random(0)
    latencies: list[float] = []
    with sleeping_bases(start_s) as bases:

        async def ask(number: int, base: int) -> None:
            began = time.monotonic()
            await bases[base].generate.remote(sleeping_request(number))
            latencies.append(time.monotonic() - began)

        ends, calls = time.monotonic() + seconds, list[asyncio.Task[None]]()
        while time.monotonic() < ends:
            base = rng.choices(range(len(bases)), popularity(len(bases)))[0]
            calls.append(asyncio.create_task(ask(len(calls), base)))
            await asyncio.sleep(rng.expovariate(1 / each_s))
        await asyncio.gather(*calls)
    return latencies


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bases", type=int, nargs="?", default=8)
    parser.add_argument("gpus", type=int, nargs="?", default=4)
    parser.add_argument("requests", type=int, nargs="*", default=[4_494, 7_000])
    parser.add_argument("--start", type=float, default=5.0)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--ray", type=float, metavar="SECONDS")
    options = parser.parse_args()
    if options.ray:
        from tests.service import ray_cluster

        with tempfile.TemporaryDirectory() as home, ray_cluster(Path(home)):
            print(line("on Ray", asyncio.run(ask_on_ray(options.ray, options.start))))  # noqa: T201
        return
    for requests, seed in itertools.product(options.requests, range(options.seeds)):
        calls = day(options.bases, requests, seed)
        names = sorted({call.base for call in calls})
        top = max(sum(call.base == name for call in calls) for name in names) / len(calls)
        busy = sum(call.takes_s for call in calls) / options.gpus / (UNTIL_S - FROM_S)
        limit = longest_wait([(0, 1.0)] * options.bases, options.gpus)
        assert limit
        print(  # noqa: T201
            f"{options.bases} bases on {options.gpus} GPUs, {len(calls)} requests in 9 hours (most popular base "
            f"{top:.0%}, GPUs {busy:.0%} busy), start {options.start:g} s, seed {seed}",
            flush=True,
        )
        sharing = Sharing(options.gpus, options.start, max_replicas=options.gpus)
        outcome = GpuSimulation(names, sharing).run(calls)
        limit_s = limit.seconds(start_s=options.start, drain_s=outcome.drain_s) + 4 * ROUND_S
        print(line("shared", outcome.latencies_s), told(outcome, limit_s), sep="\n", flush=True)  # noqa: T201
        found = {patience_s: pinned(calls, options.gpus, options.start, patience_s) for patience_s in PATIENCES_S}
        best = min(found, key=lambda one: quantile(sorted(found[one]), 0.95))
        print(line(f"pinned, best patience {best:g} s", found[best]), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
