"""More bases than GPUs on real Ray: each answers, although those that have the GPUs are asked all the time."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator

import pytest
from ray import serve
from ray.serve.handle import DeploymentHandle

from serve_app.autoscaling.policy import ray_settings
from serve_app.settings import AutoscalingSettings
from tests.replicas.sleeper import Sleeper, sleeping_request

# As many as `tests.service` pretends to have.
GPUS = 4
BASES = 2 * GPUS
START_S = 5.0
# A replica is a process, which takes a while to start where the machine is busy.
WAIT_S = 240.0

pytestmark = pytest.mark.slow


@pytest.fixture
def bases(cluster: int) -> Iterator[list[DeploymentHandle]]:
    """Bases that start from zero, each an application of its own."""
    settings = AutoscalingSettings(min_replicas=0, max_replicas=2, cluster_gpus=GPUS)
    deployment = Sleeper.options(
        autoscaling_config=ray_settings(settings, gpus=1.0),
        max_ongoing_requests=4,
        ray_actor_options={"num_cpus": 0.1, "num_gpus": 1},
        graceful_shutdown_timeout_s=10,
    )
    names = [f"base-{number}-{secrets.token_hex(4)}" for number in range(BASES)]
    yield [serve.run(deployment.bind(START_S), name=name, route_prefix=None) for name in names]
    for name in names:
        serve.delete(name, _blocking=False)


async def test_every_base_answers_while_those_with_the_gpus_are_busy(bases: list[DeploymentHandle]) -> None:
    number = iter(range(1_000_000))

    async def ask(base: int) -> None:
        await bases[base].generate.remote(sleeping_request(next(number)))

    async def keep_asking(base: int) -> None:
        while True:
            await ask(base)

    first, others = range(GPUS), range(GPUS, BASES)
    async with asyncio.timeout(WAIT_S):
        await asyncio.gather(*map(ask, first))
        busy = [asyncio.ensure_future(keep_asking(base)) for base in first]
        await asyncio.gather(*map(ask, others))
        # Those that gave way come back.
        for call in busy:
            call.cancel()
        await asyncio.gather(*map(ask, first))
