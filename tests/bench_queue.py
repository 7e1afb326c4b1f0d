"""How busy the device is while somebody waits for it: `python -m tests.bench_queue [--service]`.

Runs a demo base with a queue that is never empty, adapters in turn, and prints the share of that time in which a
pass ran (swap, denoising and decoding), and how well the passes were predicted. With `--service` it does the same
through HTTP, an ingress and Ray, with more callers than one batch holds.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from serve_app.engine.worker.pace import LoadStats

REQUESTS = 60
CALLERS = 12
STYLES = ("sketch", "night", "sepia", "")


@dataclass(frozen=True)
class Busy:
    """What the books of one run say."""

    busy_s: float
    predicted_s: float
    wall_s: float
    passes: int

    def __str__(self) -> str:
        """Return the line that is printed."""
        return (
            f"busy {self.busy_s / self.wall_s:.1%} of {self.wall_s:.1f} s over {self.passes} requests, "
            f"predicted {self.predicted_s / self.busy_s:.2f} of what passes took"
        )


def between(before: LoadStats, after: LoadStats, wall_s: float) -> Busy:
    """Return what happened between two states of the books."""
    return Busy(after.busy_s - before.busy_s, after.predicted_s - before.predicted_s, wall_s, REQUESTS)


def run_worker() -> Busy:
    """Run one worker in this process, made as a replica makes it."""
    from serve_app.engine.weights.fused import FusedWeights
    from serve_app.engine.weights.integrity import IntegrityChecker, ThrottledChecker
    from serve_app.engine.worker.worker import EngineWorker
    from tests.engine_cases import load, parsed_adapter, request, use_of

    pipeline = load("sd15")
    weights = FusedWeights(pipeline.components)
    check = ThrottledChecker(IntegrityChecker(weights.checksummed_tensors, is_modified=weights.is_modified))
    worker = EngineWorker(pipeline, weights, max_batch_images=1, torch_threads=1, self_check=check)
    adapters = [parsed_adapter(pipeline.manifest, seed=seed) for seed in range(3)]
    worker.submit(request(steps=8), ()).future.result(60)
    before, began = worker.snapshot().work, time.perf_counter()
    jobs = [
        worker.submit(request(steps=8, seed=index, adapters=(use_of(f"me/{index % 3}"),)), [(adapters[index % 3], 1.0)])
        for index in range(REQUESTS)
    ]
    for job in jobs:
        job.future.result(600)
    wall_s = time.perf_counter() - began
    after = worker.snapshot().work
    worker.close()
    return between(before, after, wall_s)


def run_service() -> Busy:
    """Run the whole service with one base on one replica."""
    from tests.service import Service, base_settings, ray_cluster

    with tempfile.TemporaryDirectory() as home, ray_cluster(Path(home)) as port:
        from cluster.local_service import base_handle, run_service

        config = {
            "bases": [base_settings("demo/sd15")],
            "adapters": {"embedded": True, "hub": {"enabled": False}},
            "ingress": {"replicas": 1, "num_cpus": 0.1},
            "cache_dir": home,
        }
        run_service(config)
        service = Service(f"http://127.0.0.1:{port}")
        replica = base_handle("demo/sd15")

        def books() -> LoadStats:
            return replica.state.remote().result().work

        def ask(index: int) -> None:
            style = STYLES[index % len(STYLES)]
            service.draw("a house", lora=f"demo/sd15-{style}" if style else "", model="", seed=index)

        for index in range(len(STYLES)):
            service.draw("a house", lora=f"demo/sd15-{STYLES[index]}" if STYLES[index] else "")
        before, began = books(), time.perf_counter()
        with ThreadPoolExecutor(CALLERS) as callers:
            list(callers.map(ask, range(REQUESTS)))
        return between(before, books(), time.perf_counter() - began)


def main() -> None:
    """Print the machine and what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--service", action="store_true", help="through HTTP and Ray too")
    options = parser.parse_args()
    print(f"{os.cpu_count()} CPUs, {platform.machine()}, load {os.getloadavg()[0]:.1f}")  # noqa: T201
    print(f"worker:  {run_worker()}")  # noqa: T201
    if options.service:
        print(f"service: {run_service()}")  # noqa: T201


if __name__ == "__main__":
    main()
