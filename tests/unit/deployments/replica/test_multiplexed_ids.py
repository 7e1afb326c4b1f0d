"""What Ray's own multiplexer tells its controller, without a cluster: fails where a new Ray changes what is used of it.

`tests/integration/test_routing.py` holds what routers see against what replicas hold.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from ray.serve import context
from ray.serve._private.common import DeploymentID, ReplicaID, RequestRoutingInfo

from serve_app.deployments.replica.multiplexed_ids import WRAPPER, MultiplexedIds


class Controller:
    """Takes in what a replica's multiplexer pushes."""

    def __init__(self) -> None:
        self.pushed: list[frozenset[str]] = []

    def record_request_routing_info(self, info: RequestRoutingInfo) -> None:
        assert info.multiplexed_model_ids is not None
        self.pushed.append(frozenset(info.multiplexed_model_ids))


@pytest.fixture
def controller(monkeypatch: pytest.MonkeyPatch) -> Controller:
    controller = Controller()
    replica = ReplicaID(unique_id="r0", deployment_id=DeploymentID(name="base", app_name="app"))
    inside = context.ReplicaContext(replica, object, None, None, 1)  # type: ignore[arg-type]
    monkeypatch.setattr(context, "_INTERNAL_REPLICA_CONTEXT", inside)
    monkeypatch.setattr("ray.serve.multiplex._get_global_client", lambda: controller)
    return controller


async def until(is_so: Callable[[], bool]) -> None:
    for _ in range(3000):
        if is_so():
            return
        await asyncio.sleep(0.02)
    pytest.fail("it never became so")


async def close(ids: MultiplexedIds) -> None:
    wrapper: Any = getattr(ids, WRAPPER)
    await wrapper.metrics_pusher.graceful_shutdown()


async def test_the_controller_is_told_what_comes_and_what_goes(controller: Controller) -> None:
    held = ["a", "b", "c"]
    ids = MultiplexedIds(lambda: held)
    await ids.update()
    await until(lambda: controller.pushed[-1:] == [frozenset("abc")])
    for gone in ("b", "a", "c"):
        held.remove(gone)
        await ids.update()
        assert ids.reported() == frozenset(held)
        await until(lambda: controller.pushed[-1:] == [frozenset(held)])
    held.append("b")
    await ids.update()
    await until(lambda: controller.pushed[-1:] == [frozenset("b")])
    await close(ids)


async def test_updates_at_the_same_time_leave_no_id_too_many_or_too_few(controller: Controller) -> None:
    held: list[str] = []
    ids = MultiplexedIds(lambda: held)

    async def change(number: int) -> None:
        held.append(f"k{number}")
        if number % 3 == 2:
            held.pop(0)
        await ids.update()

    await asyncio.gather(*(change(number) for number in range(30)))
    assert ids.reported() == frozenset(held)
    await close(ids)


async def test_a_caller_who_leaves_in_the_middle_leaves_no_id_behind(controller: Controller) -> None:
    held = ["a"]
    ids = MultiplexedIds(lambda: held)
    update = asyncio.ensure_future(ids.update())
    for _ in range(2):  # the call has begun, and Ray's multiplexer with it
        await asyncio.sleep(0)
    assert hasattr(ids, WRAPPER)
    update.cancel()
    held.clear()
    await ids.update()
    assert ids.reported() == frozenset()
    wrapper: Any = getattr(ids, WRAPPER)
    assert not wrapper._get_loading_and_loaded_model_ids()
    await close(ids)
