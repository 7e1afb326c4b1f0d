"""How soon after a burst every replica that it needs is asked for: `python -m tests.bench_scaling [runs]`.

Runs Serve's own controller with the product's policy and default intervals over replicas that sleep: 40 requests of a
quarter of a second meet one replica, or none, where 2.5 s of work are wanted before each of at most four.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

from serve_app.autoscaling.policy import ray_settings
from serve_app.settings import AutoscalingSettings
from tests.replicas.sleeper import Sleeper, sleeping_request
from tests.service import ray_cluster

REPLICAS = 4
APP = "sleeping"


def run(before: int) -> tuple[float, float]:
    """Return the seconds from the burst until all replicas run or start, and until all is answered.

    `before` replicas run when the burst comes.
    """
    from ray import serve

    settings = AutoscalingSettings(target_wait_s=2.5, min_replicas=before, max_replicas=REPLICAS)
    deployment = Sleeper.options(
        autoscaling_config=ray_settings(settings), max_ongoing_requests=4, ray_actor_options={"num_cpus": 0.1}
    )
    handle = serve.run(deployment.bind(), name=APP, route_prefix=None)
    began = time.perf_counter()
    calls = [handle.generate.remote(sleeping_request(number)) for number in range(40)]
    while sum(serve.status().applications[APP].deployments["Sleeper"].replica_states.values()) < REPLICAS:
        time.sleep(0.02)
    asked_s = time.perf_counter() - began
    for call in calls:
        call.result(timeout_s=60)
    answered_s = time.perf_counter() - began
    serve.delete(APP)
    return asked_s, answered_s


def main() -> None:
    """Print each run's seconds, and how busy the machine was."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    with tempfile.TemporaryDirectory() as home, ray_cluster(Path(home)):
        for before in (1, 0) * runs:
            load = os.getloadavg()[0]
            asked_s, answered_s = run(before)
            start = "one runs" if before else "none runs"
            print(  # noqa: T201
                f"{start}: {REPLICAS} asked for after {asked_s:.2f} s, all answered after {answered_s:.2f} s; "
                f"load {load:.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
