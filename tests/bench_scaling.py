"""How soon after a burst every replica that it needs is asked for: `python -m tests.bench_scaling [runs]`.

Runs Serve's own controller with the product's policy and default intervals over replicas that sleep: 40 requests of a
quarter of a second meet one replica, where 2.5 s of work are wanted before each of at most four.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

from serve_app.autoscaling import ray_settings
from serve_app.settings import AutoscalingSettings
from tests.service import ray_cluster
from tests.sleeper import Sleeper, sleeping_request

REPLICAS = 4
APP = "sleeping"


def run() -> float:
    """Return the seconds from the burst until all replicas run or start."""
    from ray import serve

    settings = AutoscalingSettings(target_wait_s=2.5, max_replicas=REPLICAS)
    deployment = Sleeper.options(
        autoscaling_config=ray_settings(settings), max_ongoing_requests=16, ray_actor_options={"num_cpus": 0.1}
    )
    handle = serve.run(deployment.bind(), name=APP, route_prefix=None)
    calls = [handle.generate.remote(sleeping_request(number)) for number in range(40)]
    began = time.perf_counter()
    while sum(serve.status().applications[APP].deployments["Sleeper"].replica_states.values()) < REPLICAS:
        time.sleep(0.02)
    taken_s = time.perf_counter() - began
    for call in calls:
        call.result(timeout_s=60)
    serve.delete(APP)
    return taken_s


def main() -> None:
    """Print the machine and each run's seconds."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    with tempfile.TemporaryDirectory() as home, ray_cluster(Path(home)):
        for _ in range(runs):
            load = os.getloadavg()[0]
            print(f"{REPLICAS} replicas asked for after {run():.2f} s; load {load:.1f}", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
