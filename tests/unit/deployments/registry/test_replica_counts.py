from __future__ import annotations

import asyncio
from collections.abc import Mapping

import pytest
from ray.serve.schema import DeploymentDetails, ReplicaDetails

from serve_app.deployments.registry.replica_counts import ReplicaCount, ReplicaCounts, count_of, start_failure
from tests.clock import Clock


class Serve:
    """What Serve says, or that it gives no answer."""

    def __init__(self) -> None:
        self.running = 1
        self.asked = 0
        self.is_away = False

    def __call__(self) -> Mapping[str, ReplicaCount]:
        self.asked += 1
        if self.is_away:
            raise TimeoutError
        return {"demo/sd": ReplicaCount(self.running)}


async def test_serve_is_asked_once_a_second_however_many_want_to_know() -> None:
    serve, clock = Serve(), Clock()
    counts = ReplicaCounts(serve, clock=clock, answer_timeout_s=60.0)
    assert set(map(str, await asyncio.gather(*(counts() for _ in range(10))))) == {str({"demo/sd": ReplicaCount(1)})}
    serve.running, clock.now = 2, 0.9
    assert (await counts())["demo/sd"].running == 1
    clock.now = 1.0
    assert (await counts())["demo/sd"].running == 2
    assert serve.asked == 2


async def test_what_serve_said_last_stands_while_it_gives_no_answer() -> None:
    serve, clock = Serve(), Clock()
    counts = ReplicaCounts(serve, clock=clock, answer_timeout_s=60.0)
    await counts()
    serve.is_away, clock.now = True, 5.0
    assert (await counts())["demo/sd"].running == 1
    assert serve.asked == 2


REASON = "WanPipeline makes videos, and only images are served"
RETRYING = f"""A replica failed to start with exception. Retrying 2 more time(s). Error:
ray::ServeReplica:default:base-owner--base.initialize_and_get_metadata() (pid=1, ip=127.0.0.1)
  File "replica.py", line 90, in __init__
RuntimeError: Traceback (most recent call last):
serve_app.errors.BaseUnusable: owner/base cannot be served: {REASON}"""


@pytest.mark.parametrize(
    ("message", "has_given_up", "reason"),
    [
        (RETRYING, False, REASON),
        ("", False, None),
        ("A replica failed to start with exception. Retrying. Error:\nKeyError: 1", False, None),
        ("The deployment failed to start 3 times in a row. Error:\nKeyError: 1", True, "its replicas end"),
    ],
)
def test_the_reason_is_read_from_what_serve_says(message: str, has_given_up: bool, reason: str | None) -> None:
    found = start_failure(message, has_given_up=has_given_up)
    assert found == reason or (found is not None and reason is not None and found.startswith(reason))


def replica(state: str, asked_at: float, node: str | None) -> ReplicaDetails:
    return ReplicaDetails.model_validate({"replica_id": "r", "state": state, "start_time_s": asked_at, "node_id": node})


def test_a_start_counts_from_its_oldest_replica_and_is_placed_with_its_first() -> None:
    replicas = [replica("STARTING", 20.0, None), replica("STARTING", 10.0, "a"), replica("STOPPING", 5.0, "a")]
    deployment = DeploymentDetails.model_construct(replicas=replicas, message="", status="UPDATING")
    assert count_of(deployment) == ReplicaCount(0, 2, since_s=10.0, is_placed=True)
