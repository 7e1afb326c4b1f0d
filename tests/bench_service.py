"""Two promises about waiting, measured on a real service: `python -m tests.bench_service`.

Other adapters while one downloads slowly: rounds of requests with and without a 5-second download under way, in turn,
so that whatever else the machine does falls on both. The status route while generations run: its latency alone and
beside them, in turn.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.hub_server import CDN, ErrorDetail, HubServer
from tests.service import Service, base_settings, ray_cluster

EMBEDDED = Path(__file__).parents[2] / "serve_app" / "demo" / "hub"
WEIGHTS = "pytorch_lora_weights.safetensors"
PROMPT = "a red circle on a blue background"
ROUNDS = 6
DOWNLOAD_S = 5.0
STATUS_CALLS = 100


def timed_ms(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1000


def others_ms(service: Service) -> list[float]:
    """One request for each of six adapters, one after another."""
    styles = ("night", "sepia", "sketch", "inverted", "pixel-art", "stripes")
    return [timed_ms(lambda name=name: service.draw(PROMPT, model=f"demo/sdxl-{name}", seed=1)) for name in styles]


def slow_download(service: Service, hub: HubServer) -> dict[str, float]:
    """Medians of requests for other adapters, without and with a slow download under way."""
    size_bytes = (EMBEDDED / "demo/sdxl-sepia" / WEIGHTS).stat().st_size
    others_ms(service)
    alone: list[float] = []
    beside: list[float] = []
    for turn in range(ROUNDS):
        name = f"acme/slow-{turn}"
        hub.push_folder(name, EMBEDDED / "demo/sdxl-sepia")
        hub.fail(name, ErrorDetail(bytes_per_s=size_bytes / DOWNLOAD_S, kinds=(CDN,)))
        alone += others_ms(service)
        with ThreadPoolExecutor(1) as pool:
            slow = pool.submit(service.draw, PROMPT, model=name, seed=1)
            hub.wait_for(lambda hub, name=name: hub.count(name, CDN) > 0, timeout_s=60)
            while not slow.done():
                beside += others_ms(service)
            slow.result()
    return {
        "requests_alone": len(alone),
        "requests_beside": len(beside),
        "alone_median_ms": statistics.median(alone),
        "beside_median_ms": statistics.median(beside),
        "ratio": statistics.median(beside) / statistics.median(alone),
    }


@contextmanager
def generating(service: Service) -> Iterator[None]:
    """Keep one generation after another running."""
    done = threading.Event()

    def keep_on() -> None:
        while not done.is_set():
            service.draw(PROMPT, model="demo/sdxl", num_inference_steps=50)

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(keep_on)
        try:
            yield
        finally:
            done.set()
            running.result()


def status_route(service: Service) -> dict[str, float]:
    """Medians and 95th percentiles of `GET /`, alone and while a generation runs."""
    with httpx.Client(base_url=service.url, trust_env=False) as client:
        alone = sorted(timed_ms(lambda: client.get("/")) for _ in range(STATUS_CALLS))
        with generating(service):
            beside = sorted(timed_ms(lambda: client.get("/")) for _ in range(STATUS_CALLS))
    place = int(0.95 * STATUS_CALLS)
    return {
        "alone_median_ms": statistics.median(alone),
        "beside_median_ms": statistics.median(beside),
        "alone_p95_ms": alone[place],
        "beside_p95_ms": beside[place],
    }


def main() -> None:

    from cluster.local_service import run_service

    with tempfile.TemporaryDirectory() as folder, HubServer() as hub, ray_cluster(Path(folder)) as port:
        config = {
            "bases": [base_settings("demo/sdxl")],
            "adapters": {"embedded": True, "hub": {"endpoint": hub.endpoint, "timeout_s": 60}},
            "ingress": {"replicas": 1, "num_cpus": 0.1},
            "cache_dir": f"{folder}/cache",
        }
        run_service(config)
        service = Service(f"http://127.0.0.1:{port}")
        results = {
            "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
            "others_while_one_downloads": slow_download(service, hub),
            "status_route": status_route(service),
        }
    json.dump(results, sys.stdout, indent=2)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
