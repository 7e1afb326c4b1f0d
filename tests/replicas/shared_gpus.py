"""Bases on Ray that sleep, each an application of its own, on the GPUs that `tests.service` pretends to have."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager

from ray import serve
from ray.serve.handle import DeploymentHandle

from serve_app.autoscaling.policy import ray_settings
from serve_app.settings import AutoscalingSettings
from tests.replicas.sleeper import Sleeper

GPUS = 4
BASES = 2 * GPUS


@contextmanager
def sleeping_bases(start_s: float) -> Iterator[list[DeploymentHandle]]:
    """Run twice as many bases as there are GPUs, from zero; each replica sleeps for `start_s` before it runs."""
    settings = AutoscalingSettings(min_replicas=0, max_replicas=2, cluster_gpus=GPUS)
    deployment = Sleeper.options(
        autoscaling_config=ray_settings(settings, gpus=1.0),
        max_ongoing_requests=4,
        ray_actor_options={"num_cpus": 0.1, "num_gpus": 1},
        graceful_shutdown_timeout_s=10,
    )
    names = [f"base-{number}-{secrets.token_hex(4)}" for number in range(BASES)]
    yield [serve.run(deployment.bind(start_s), name=name, route_prefix=None) for name in names]
    for name in names:
        serve.delete(name, _blocking=False)
