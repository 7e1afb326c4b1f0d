"""Two hours' requests in ten minutes, and what they leave behind: `python -m tests.bench_memory --minutes 10`.

A real service with both demo bases, small images of few steps, and caches that hold a few adapters of the hundreds that
are asked for, new ones all the time. Callers draw, stream, leave, run out of time, ask for what cannot be had, name and
forget aliases. The memory of every process of the cluster is read every five seconds; what it was in the last fifth of
the run may be at most a twentieth over what it was in the fifth after the warm-up, which is the first fifth.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from safetensors.numpy import load_file, save

from tests.footprint import footprints
from tests.hub_server import HubServer
from tests.service import BASES, EMBEDDED, STYLES, base_settings, ray_cluster

SAMPLE_S = 5.0
MAX_GROWTH = 0.05
CALLERS = 6
POPULAR = 60
# Of the ids that were asked for once, how many the Hub still has.
KEPT_NEW = 100
WEIGHTS = "pytorch_lora_weights.safetensors"
SCHEDULERS = ("EulerDiscreteScheduler", "DDIMScheduler", "EulerAncestralDiscreteScheduler")
SIDES = (32, 40, 48, 64)


class Adapters:
    """Adapters on a Hub, no two alike: some that everybody asks for, and ever new ones."""

    def __init__(self, hub: HubServer) -> None:
        self._hub = hub
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._new: list[str] = []
        self._originals = [
            (EMBEDDED / f"demo/{base.split('/')[1]}-{style}") for base, style in itertools.product(BASES, STYLES)
        ]
        self.popular = [self._push() for _ in range(POPULAR)]

    def new(self) -> str:
        """Return an id that nobody has asked for yet; the Hub forgets the oldest such."""
        with self._lock:
            self._new.append(self._push())
            if len(self._new) > KEPT_NEW:
                self._hub.delete(self._new.pop(0))
            # Else its list of requests would be what grows.
            self._hub.requests.clear()
            return self._new[-1]

    def _push(self) -> str:
        number = next(self._numbers)
        folder = self._originals[number % len(self._originals)]
        tensors = load_file(folder / WEIGHTS)
        name = next(name for name in tensors if name.endswith("lora_B.weight"))
        tensors[name] = tensors[name] * (1 - 1e-3 * (1 + number % 500))
        card = (folder / "README.md").read_bytes()
        model = f"acme/style-{number}"
        self._hub.push(model, {"README.md": card, WEIGHTS: save(tensors)})
        return model


class Caller:
    """One caller who does this and that, one after the other."""

    def __init__(self, url: str, adapters: Adapters, seed: int, *, is_over: threading.Event) -> None:
        self._http = httpx.Client(base_url=url, timeout=60, trust_env=False)
        self._url = url
        self._adapters = adapters
        self._rng = random.Random(seed)
        self._name = f"ours/alias-{seed}"
        self._is_over = is_over
        self.seen: Counter[str] = Counter()
        self._deeds: dict[Callable[[], int], float] = {
            self._draw_popular: 40, self._draw_base: 10, self._draw_new: 10, self._stream: 10, self._leave: 8,
            self._run_out_of_time: 3, self._ask_badly: 10, self._rename: 3, self._look_around: 3, self._redraw: 3,
        }  # fmt: skip

    def go_on(self) -> None:
        while not self._is_over.is_set():
            (deed,) = self._rng.choices([*self._deeds], weights=[*self._deeds.values()])
            try:
                self.seen[f"{deed.__name__[1:]} {deed()}"] += 1
            except httpx.HTTPError as error:
                self.seen[f"{deed.__name__[1:]} {type(error).__name__}"] += 1

    def _parameters(self) -> dict[str, Any]:
        rng = self._rng
        parameters: dict[str, Any] = {"num_inference_steps": rng.choice((1, 2, 3)), "seed": rng.getrandbits(32)}
        if rng.random() < 0.3:
            parameters |= {"width": rng.choice(SIDES), "height": rng.choice(SIDES)}
        if rng.random() < 0.2:
            parameters |= {"scheduler": rng.choice(SCHEDULERS), "num_inference_steps": 4}
        return parameters

    def _body(self) -> dict[str, Any]:
        return {"inputs": f"a {self._rng.getrandbits(40):x} star", "parameters": self._parameters()}

    def _popular(self) -> str:
        return self._adapters.popular[min(int(self._rng.paretovariate(0.6)) - 1, POPULAR - 1)]

    def _draw_popular(self) -> int:
        body = self._body()
        if self._rng.random() < 0.3:
            body["parameters"]["loras"] = [{"id": self._popular(), "scale": self._rng.choice((0.3, 0.5, 1.0))}]
            return self._http.post("/", json=body).status_code
        return self._http.post(f"/models/{self._popular()}", json=body).status_code

    def _draw_base(self) -> int:
        return self._http.post(f"/models/{self._rng.choice(BASES)}", json=self._body()).status_code

    def _draw_new(self) -> int:
        return self._http.post(f"/models/{self._adapters.new()}", json=self._body()).status_code

    def _redraw(self) -> int:
        path = f"/models/{self._rng.choice(BASES)}"
        image = self._http.post(path, json=self._body(), headers={"accept": "image/png"}).content
        return self._http.post(path, content=image, headers={"content-type": "image/png"}).status_code

    def _openai_body(self) -> dict[str, Any]:
        steps, seed = self._rng.choice((2, 3, 4)), self._rng.getrandbits(32)
        return {
            "model": self._popular(), "prompt": f"a {self._rng.getrandbits(40):x} star", "size": "32x32",
            "num_inference_steps": steps, "seed": seed, "stream": True, "partial_images": 2,
        }  # fmt: skip

    def _stream(self) -> int:
        with self._http.stream("POST", "/v1/images/generations", json=self._openai_body()) as reply:
            for _ in reply.iter_lines():
                pass
            return reply.status_code

    def _leave(self) -> int:
        """Hang up in the middle, of a stream or of a plain request."""
        patience = httpx.Timeout(60, read=self._rng.uniform(0.005, 0.15))
        body = self._body()
        body["parameters"]["num_inference_steps"] = 8
        try:
            with httpx.Client(base_url=self._url, timeout=patience, trust_env=False) as http:
                if self._rng.random() < 0.5:
                    return http.post(f"/models/{self._popular()}", json=body).status_code
                with http.stream("POST", "/v1/images/generations", json=self._openai_body()) as reply:
                    next(reply.iter_lines(), None)
                    return reply.status_code
        except httpx.ReadTimeout:
            return 499

    def _run_out_of_time(self) -> int:
        headers = {"x-request-timeout-s": "0.03"}
        return self._http.post(f"/models/{self._popular()}", json=self._body(), headers=headers).status_code

    def _ask_badly(self) -> int:
        number = self._rng.getrandbits(40)
        path, body = self._rng.choice((
            (f"/models/nobody/nothing-{number:x}", {"inputs": "a star"}),
            ("/", {"inputs": "a star", "parameters": {f"unknown_{number:x}": 1}}),
            ("/", {"inputs": "a star", "parameters": {"width": 8 + number % 1000 * 1000}}),
            ("/", {"parameters": {}}),
            ("/v1/images/generations", {"model": f"nobody/{number:x}", "prompt": "a star"}),
            (f"/nowhere/{number:x}", {}),
            (f"/models/{self._popular()}", {"inputs": "a star", "parameters": {"scheduler": f"No{number:x}"}}),
        ))  # fmt: skip
        return self._http.post(path, json=body).status_code

    def _rename(self) -> int:
        body = {"lora_name": self._name, "source": {"uri": self._popular()}}
        self._http.post("/v1/loras", json=body)
        self._http.post(f"/models/{self._name}", json=self._body())
        return self._http.delete(f"/v1/loras/{self._name}").status_code

    def _look_around(self) -> int:
        path = self._rng.choice(("/v1/replicas", "/v1/loras", "/v1/models", "/v1/bases", "/health", "/openapi.json"))
        return self._http.get(path).status_code


@contextmanager
def load_on(url: str, hub: HubServer) -> Iterator[list[Caller]]:
    """Let callers call for the time of the block."""
    is_over = threading.Event()
    adapters = Adapters(hub)
    callers = [Caller(url, adapters, seed, is_over=is_over) for seed in range(CALLERS)]
    threads = [threading.Thread(target=caller.go_on, daemon=True) for caller in callers]
    for thread in threads:
        thread.start()
    try:
        yield callers
    finally:
        is_over.set()
        for thread in threads:
            thread.join(60)


def samples(seconds: float, note: Callable[[str], object]) -> dict[str, list[tuple[float, int]]]:
    """What each process took, as (seconds since the start, bytes)."""
    began = time.monotonic()
    taken: defaultdict[str, list[tuple[float, int]]] = defaultdict(list)
    while (at := time.monotonic() - began) < seconds:
        for name, footprint in footprints().items():
            taken[name].append((at, footprint.memory_bytes))
        total = sum(series[-1][1] for series in taken.values())
        note(f"{at:5.0f} s  {total / 1e6:8.1f} MB  load {os.getloadavg()[0]:.1f}")
        time.sleep(SAMPLE_S)
    return dict(taken)


def by_fifth(series: list[tuple[float, int]], seconds: float) -> list[float]:
    """The median memory in each fifth of the time; none at all where the process was not there in each."""
    fifths = [[taken for at, taken in series if number <= 5 * at / seconds < number + 1] for number in range(5)]
    return [statistics.median(fifth) for fifth in fifths] if all(fifths) else []


def settings(folder: str, hub: HubServer) -> dict[str, Any]:
    replica = {
        "num_cpus": 0.1, "torch_threads": 1, "host_cache": "3MB", "max_warm_up_adapters": 8,
        "max_queued_requests": 64,
    }  # fmt: skip
    defaults = {"steps": 2, "guidance_scale": 3.0, "width": 32, "height": 32}
    return {
        "bases": [base_settings(base, replica=replica, defaults=defaults) for base in BASES],
        "adapters": {"embedded": True, "hub": {"endpoint": hub.endpoint}, "resolution_ttl_s": 20},
        "ingress": {"replicas": 2, "num_cpus": 0.1},
        "cache_dir": f"{folder}/cache",
        "disk_cache": "30MB",
    }


def show(taken: dict[str, list[tuple[float, int]]], seconds: float) -> bool:
    """Print what each process grew by, and say whether all of them stayed."""
    out, is_flat = sys.stdout.write, True
    out("\nprocess                   MB in each fifth of the time                  growth after the first\n")
    for name, series in sorted(taken.items()):
        medians = by_fifth(series, seconds)
        if not medians:
            out(f"{name:28} was there from {series[0][0]:.0f} s to {series[-1][0]:.0f} s\n")
            continue
        grown = medians[4] / medians[1] - 1
        is_flat = is_flat and grown <= MAX_GROWTH
        out(f"{name:28} {'  '.join(f'{median / 1e6:7.1f}' for median in medians)}  {grown:+9.1%}\n")
    return is_flat


def main() -> None:

    from cluster.local_service import run_service

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    seconds = parser.parse_args().minutes * 60
    # Else Ray's workers give way to whatever else runs on the machine.
    os.environ.update({"RAY_worker_niceness": "0"})
    with tempfile.TemporaryDirectory() as folder, HubServer() as hub, ray_cluster(Path(folder)) as port:
        run_service(settings(folder, hub))
        with load_on(f"http://127.0.0.1:{port}", hub) as callers:
            taken = samples(seconds, lambda line: sys.stderr.write(f"{line}\n"))
        seen = sum((caller.seen for caller in callers), Counter[str]())
    out = sys.stdout.write
    out(f"machine: {platform.machine()}, {os.cpu_count()} CPUs; {sum(seen.values())} requests in {seconds:.0f} s\n")
    for what, count in sorted(seen.items()):
        out(f"  {what:32} {count}\n")
    if not show(taken, seconds):
        sys.exit(f"a process grew by more than {MAX_GROWTH:.0%}")


if __name__ == "__main__":
    main()
