"""Replicas come with a burst, go when it is over, and come again from none; nothing is lost on any of these ways."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest
from ray import serve
from ray.serve.handle import DeploymentHandle

from serve_app.autoscaling.policy import ray_settings
from serve_app.core import GenerationResult
from serve_app.settings import AutoscalingSettings
from tests.replicas.sleeper import Sleeper, sleeping_request

# Replicas are processes, which take a while to start where the machine is busy.
WAIT_S = 120.0

# Replicas come after a while and go after a while.
pytestmark = pytest.mark.slow


def deploy(app: str, **autoscaling: float) -> DeploymentHandle:
    # Half the default interval between reports: the machines that run this are busy with other tests. The policy acts
    # on what it sees of a burst; so much later than by default it sees all of it, however slowly that arrives. From
    # zero Serve does not wait so long.
    fields = {
        "upscale_delay_s": 8.0,
        "downscale_delay_s": 0.5,
        "target_wait_s": 2.5,
        "metrics_interval_s": 0.25,
        **autoscaling,
    }
    settings = AutoscalingSettings.model_validate(fields)
    deployment = Sleeper.options(
        autoscaling_config=ray_settings(settings),
        max_ongoing_requests=16,
        max_queued_requests=200,
        ray_actor_options={"num_cpus": 0.1},
        graceful_shutdown_timeout_s=10,
    )
    return serve.run(deployment.bind(), name=app, route_prefix=None)


def replicas(app: str) -> int:
    """Return how many replicas run or start."""
    states = serve.status().applications[app].deployments["Sleeper"].replica_states
    return sum(count for state, count in states.items() if str(state).rpartition(".")[2] in ("RUNNING", "STARTING"))


async def until(is_so: Callable[[], bool], *, what: str, within_s: float) -> None:
    """Wait until something is so."""
    began = time.monotonic()
    while not await asyncio.to_thread(is_so):
        assert time.monotonic() - began < within_s, f"{what}: not within {within_s} s"
        await asyncio.sleep(0.02)


async def answers(calls: list[Awaitable[GenerationResult]]) -> list[str]:
    return [result.request_id for result in await asyncio.wait_for(asyncio.gather(*calls), WAIT_S)]


async def test_a_burst_asks_for_all_replicas_at_once_and_nothing_is_lost_on_the_way_down(app: str) -> None:
    handle = deploy(app, min_replicas=1, max_replicas=4)
    # 100 requests of a quarter of a second are 25 s of work. Of that 17 s are left once the delay is over, for 2.5 s
    # before each: more than four replicas take.
    burst = [handle.generate.remote(sleeping_request(number)) for number in range(100)]
    seen: list[int] = []
    await until(lambda: seen.append(replicas(app)) or seen[-1] > 1, what="more replicas", within_s=WAIT_S)
    assert seen[-1] == 4
    assert await answers(burst) == [f"request-{number}" for number in range(100)]

    trickle: list[Awaitable[GenerationResult]] = []
    while await asyncio.to_thread(replicas, app) > 1:
        trickle.append(handle.generate.remote(sleeping_request(len(trickle))))
        await asyncio.sleep(0.4)
    assert await answers(trickle) == [f"request-{number}" for number in range(len(trickle))]


async def test_a_base_goes_to_zero_and_answers_everything_that_waited_for_its_return(app: str) -> None:
    handle = deploy(app, min_replicas=0, initial_replicas=1, max_replicas=4)
    await answers([handle.generate.remote(sleeping_request(0))])
    await until(lambda: replicas(app) == 0, what="no replica", within_s=WAIT_S)
    calls = [handle.generate.remote(sleeping_request(number)) for number in range(40)]
    seen: list[int] = []
    await until(lambda: seen.append(replicas(app)) or seen[-1] > 0, what="a replica", within_s=WAIT_S)
    # Serve starts one; the policy asks for the others once that one runs.
    assert seen[-1] == 1
    assert await answers(calls) == [f"request-{number}" for number in range(40)]
