"""What the service adds to an image: `python -m tests.bench_overhead`.

Each round draws one image through HTTP and the same image directly on an engine in this process, in turn, so that
whatever else the machine does falls on both. The overhead of a round is the time from sending the request to holding
the image's bytes, less the time on the device that the reply reports. `server-timing` says where it went; what is left
beside it is the client, the proxy and the way between them. A bare call of a replica through a handle of Serve, which
asks for nothing of the device, is timed in the same rounds: what a hop costs at least.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import psutil

from serve_app.core import ScaledAdapter, UnresolvedRequest
from tests.service import Service, base_settings, ray_cluster

BASE = "demo/sd15"
PROMPT = "a red circle on a blue background"
ON_DEVICE = ("swap", "denoise", "decode")
# Of the command lines that Ray gives its processes.
PROCESSES = {"ServeProxy": "proxy", "ProxyActor": "proxy", ":LoraplexIngress": "ingress", ":base-": "replica"}
STAGES = ("parse", "hop", "queue", "fetch", "encode")


class DirectEngine:
    """The engine of one base in this process, as a replica has it, with nothing in front of it."""

    def __init__(self, steps: int) -> None:
        import torch

        from serve_app.config import BaseModelConfig
        from serve_app.demo.embedded import embedded_root
        from serve_app.deployments.ingress.resolve_defaults import resolve_defaults
        from serve_app.engine.base.fetching import resolve_source
        from serve_app.engine.drawing.pipeline import BasePipeline
        from serve_app.engine.weights.fused import FusedWeights
        from serve_app.engine.worker.worker import EngineWorker

        base = BaseModelConfig.model_validate(base_settings(BASE))
        pipeline = BasePipeline.load(base, resolve_source(base.source, embedded_root()), device=torch.device("cpu"))
        self._worker = EngineWorker(pipeline, FusedWeights(pipeline.components), max_batch_images=4, torch_threads=1)
        no_adapters: tuple[ScaledAdapter, ...] = ()
        self._request = resolve_defaults(
            UnresolvedRequest(PROMPT, seed=0, steps=steps), base, no_adapters, request_id="direct", seed=0
        )

    def draw(self, seed: int) -> None:
        self._worker.submit(replace(self._request, seed=seed), ()).future.result(60)

    def close(self) -> None:
        self._worker.close()


def stages_of(reply: httpx.Response) -> dict[str, float]:
    """The stages of a reply's `server-timing`, in milliseconds."""
    entries = (entry.strip().split(";dur=") for entry in reply.headers["server-timing"].split(","))
    return {name: float(duration_ms) for name, duration_ms in entries}


def cpu_ms() -> dict[str, float]:
    """The processor time that each process of the request's way has used so far, summed over its kind."""
    used = dict.fromkeys(PROCESSES.values(), 0.0)
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            title = " ".join(process.cmdline())
            for marker, name in PROCESSES.items():
                if marker in title:
                    times = process.cpu_times()
                    used[name] += (times.user + times.system) * 1e3
    return used


def measured(service: Service, engine: DirectEngine, rounds: int, steps: int) -> list[dict[str, float]]:
    """One row a round: the call over HTTP with its stages, and the direct call."""

    rows: list[dict[str, float]] = []
    from cluster.local_service import base_handle

    replica = base_handle(BASE)
    for seed in range(rounds):
        started = time.perf_counter()
        reply = service.ask(PROMPT, model=BASE, seed=seed, num_inference_steps=steps)
        http_ms = (time.perf_counter() - started) * 1e3
        started = time.perf_counter()
        engine.draw(seed)
        direct_ms = (time.perf_counter() - started) * 1e3
        started = time.perf_counter()
        replica.state.remote().result(timeout_s=60)
        bare_ms = (time.perf_counter() - started) * 1e3
        stages = stages_of(reply.raise_for_status())
        device_ms = sum(stages[name] for name in ON_DEVICE)
        row = {
            "http": http_ms,
            "device": device_ms,
            "overhead": http_ms - device_ms,
            "direct": direct_ms,
            "http_less_direct": http_ms - direct_ms,
            "bare_handle_call": bare_ms,
            "client_and_proxy": http_ms - stages["total"],
        }
        rows.append(row | {name: stages[name] for name in (*STAGES, *ON_DEVICE)})
    return rows


def medians(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(row[name] for row in rows), 2) for name in rows[0]}


@contextmanager
def running(folder: Path, *, ingress_replicas: int) -> Iterator[Service]:

    from cluster.local_service import run_service

    with ray_cluster(folder) as port:
        config = {
            "bases": [base_settings(BASE)],
            "adapters": {"embedded": True, "hub": {"enabled": False}},
            "ingress": {"replicas": ingress_replicas, "num_cpus": 0.1},
            "cache_dir": f"{folder}/cache",
        }
        run_service(config)
        yield Service(f"http://127.0.0.1:{port}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--ingress-replicas", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        running(Path(folder), ingress_replicas=options.ingress_replicas) as service,
    ):
        engine = DirectEngine(options.steps)
        try:
            measured(service, engine, 10, options.steps)
            load_before, cpu_before = os.getloadavg()[0], cpu_ms()
            rows = measured(service, engine, options.rounds, options.steps)
            cpu_after = cpu_ms()
        finally:
            engine.close()
    overheads = sorted(row["overhead"] for row in rows)
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "load_average": [load_before, os.getloadavg()[0]],
        "rounds": options.rounds,
        "median_ms": medians(rows),
        "cpu_ms_per_request": {
            name: round((after - cpu_before[name]) / options.rounds, 2) for name, after in cpu_after.items()
        },
        "overhead_ms": {
            "quartiles": [round(value, 2) for value in statistics.quantiles(overheads, n=4)],
            "least": round(overheads[0], 2),
        },
    }
    json.dump(result, sys.stdout, indent=2)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
