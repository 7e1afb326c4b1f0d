from __future__ import annotations

import asyncio
from collections.abc import Mapping

from serve_app.deployments.registry.replica_counts import ReplicaCount, ReplicaCounts
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
