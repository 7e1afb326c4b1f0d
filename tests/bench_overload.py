"""Ten times as much as can be done, for minutes, on a real service: `python -m tests.bench_overload --minutes 2`.

First as much as callers who wait for their answers can get out of it, then ten times that whatever the answers. The
device naps (`tests.replicas.napping`), so that generation takes no processor from refusing; the callers, in processes
of their own, share the machine. Some that are refused come back when `Retry-After` says, during the overload and
after it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from tests.footprint import Footprint, footprints
from tests.replicas.napping import IMAGE_S
from tests.service import base_settings, ray_cluster

BASE = "demo/sd15"
TIMES = 10
CALLERS = 40
BEST_S = 20.0
REST_S = 10.0


def begin(mode: str, url: str, seconds: float, **options: Any) -> subprocess.Popen[str]:
    """Start callers."""
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "tests.open_loop", mode, url, "--seconds", str(seconds), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def result_of(callers: subprocess.Popen[str]) -> dict[str, Any]:
    return json.loads(callers.communicate()[0])


def by_kind(found: dict[str, Footprint]) -> dict[str, tuple[int, float]]:
    """The memory, in bytes, and the processor time of all processes of a kind."""
    sums: defaultdict[str, tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    for name, footprint in found.items():
        kind = name.rsplit("/", 1)[0]
        sums[kind] = sums[kind][0] + footprint.memory_bytes, sums[kind][1] + footprint.cpu_s
    return dict(sums)


def settings(folder: str, ingress_replicas: int) -> dict[str, Any]:
    replica = {"num_cpus": 0.1, "torch_threads": 1}
    return {
        "bases": [base_settings(BASE, replica=replica)],
        "adapters": {"embedded": True, "hub": {"enabled": False}},
        "ingress": {"replicas": ingress_replicas, "num_cpus": 0.1},
        "cache_dir": f"{folder}/cache",
        "log_level": "WARNING",
    }


def measured(url: str, minutes: float, times: float) -> dict[str, Any]:
    """One run: the best, the overload, the rest after it."""
    seconds = minutes * 60
    result: dict[str, Any] = {}
    result_of(begin("closed", url, 5, callers=CALLERS))
    idle_health = result_of(begin("health", url, 5))
    before = by_kind(footprints())
    health, callers = begin("health", url, BEST_S), begin("closed", url, BEST_S, callers=CALLERS)
    best, best_health = result_of(callers), result_of(health)
    at_best = by_kind(footprints())
    rate = times * best["goodput_per_s"]
    callers, health = begin("open", url, seconds, rate=rate), begin("health", url, seconds)
    most: dict[str, int] = {}
    ends_at = time.monotonic() + seconds
    while time.monotonic() < ends_at:
        time.sleep(2)
        now = by_kind(footprints())
        most = {kind: max(most.get(kind, 0), memory) for kind, (memory, _) in now.items()}
    overload_health = result_of(health)
    at_end = by_kind(footprints())
    overload = result_of(callers)
    time.sleep(REST_S)
    after_health, after = result_of(begin("health", url, 5)), by_kind(footprints())
    asked, best_asked = (sum(counts["statuses"].values()) for counts in (overload, best))
    result |= {
        "best": best,
        "overload": overload,
        "goodput_share": overload["goodput_per_s"] / best["goodput_per_s"],
        "health_ms": {"idle": idle_health, "best": best_health, "overload": overload_health, "after": after_health},
        "memory_mb": {
            kind: [round(value / 1e6, 1) for value in (memory, most.get(kind, 0), after.get(kind, (0, 0))[0])]
            for kind, (memory, _) in before.items()
        },
        "cpu_ms_per_request": {
            kind: [
                round((at_best[kind][1] - before[kind][1]) / best_asked * 1e3, 2),
                round((at_end[kind][1] - at_best[kind][1]) / asked * 1e3, 2),
            ]
            for kind in before
            if kind in at_end and kind in at_best
        },
    }
    return result


def show(result: dict[str, Any]) -> None:
    best, overload, out = result["best"], result["overload"], sys.stdout.write
    out(f"machine        {platform.machine()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}\n")
    out(f"the device     one image in {IMAGE_S * 1e3:.0f} ms, so {1 / IMAGE_S:.1f}/s at most\n")
    out(f"best           {best['goodput_per_s']:.2f}/s with {CALLERS} callers that wait\n")
    out(f"offered        {overload['offered_per_s']:.1f}/s for {overload['seconds']:.0f} s\n")
    out(f"goodput        {overload['goodput_per_s']:.2f}/s, {result['goodput_share']:.1%} of the best\n")
    out(f"answers        {overload['statuses']}, {overload['without_retry_after']} refusals without Retry-After\n")
    for name in ("served_s", "refused_s", "retry_after_s"):
        out(f"{name:14} {overload[name]}\n")
    out(f"came back      meanwhile {overload['returned']}, afterwards {overload['returned_after']}\n")
    out(f"at once        {overload['most_at_once']} requests\n")
    for when, health in result["health_ms"].items():
        out(f"health, ms     {when:9} {health}\n")
    out("\nprocesses             MB before   most  after    CPU ms a request: at best, overloaded\n")
    for kind, (before, most, after) in result["memory_mb"].items():
        best_ms, overload_ms = result["cpu_ms_per_request"].get(kind, (0.0, 0.0))
        out(f"{kind:20} {before:10.1f} {most:6.1f} {after:6.1f} {best_ms:12.2f} {overload_ms:8.2f}\n")


def main() -> None:

    from cluster.local_service import run_service
    from tests.replicas.napping import NappingReplica

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--times", type=float, default=TIMES)
    parser.add_argument("--ingress-replicas", type=int, default=2)
    options = parser.parse_args()
    # Else Ray's workers give way to whatever else runs on the machine.
    os.environ.update({"RAY_worker_niceness": "0"})
    with tempfile.TemporaryDirectory() as folder, ray_cluster(Path(folder)) as port:
        config = settings(folder, options.ingress_replicas)
        run_service(config, replica=NappingReplica)
        show(measured(f"http://127.0.0.1:{port}", options.minutes, options.times))


if __name__ == "__main__":
    main()
