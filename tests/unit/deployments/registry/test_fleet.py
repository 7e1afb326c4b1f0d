from __future__ import annotations

import asyncio
from typing import Any

import pytest
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError

from serve_app.catalog.replica_report import ReplicaReport
from serve_app.core import AdapterSpec
from serve_app.deployments.registry.fleet import Fleet
from serve_app.deployments.registry.replica_counts import ReplicaCount, ReplicaCounts
from serve_app.errors import ModelNotFound, NotReady
from tests.clock import Clock

SPEC = AdapterSpec("me/style", "demo/sd", "r1", "f", "folder", "me/style", 1)


# What Serve answers in the place of a replica that is late.
LATE = TimeoutError()


class Handle:
    """A deployment whose replicas answer a broadcast with these values; with each look those that come next."""

    def __init__(self, *values: Any, then: tuple[Any, ...] | None = None) -> None:
        self.values = values
        self._then = then
        self.calls: list[tuple[Any, ...]] = []
        self.looks = 0

    def broadcast(self, *call: Any) -> Handle:
        self.calls.append(call)
        return self

    def results(self, *, timeout_s: float, return_exceptions: bool) -> list[Any]:
        assert return_exceptions
        self.looks += 1
        if not self.values:
            raise DeploymentUnavailableError(DeploymentID("none", "app"))
        shown, self.values = list(self.values), self._then or self.values
        return shown


def fleet(counts: dict[str, tuple[int, int]], clock: Clock | None = None, **handles: Handle) -> Fleet:
    by_base: Any = {base.replace("_", "/"): handle for base, handle in handles.items()}
    known = {base: ReplicaCount(*count) for base, count in counts.items()}
    clock = clock or Clock(100.0)
    return Fleet(by_base, ReplicaCounts(lambda: known, clock=clock, answer_timeout_s=60.0), clock=clock)


def report(name: str, **fields: Any) -> ReplicaReport:
    return ReplicaReport(name, "demo/sd", **fields)


async def test_a_replica_that_hangs_hides_nobody_and_is_shown_as_it_was() -> None:
    handle, clock = Handle(report("r2"), report("r1", waiting=3)), Clock(100.0)
    seen = fleet({"demo/sd": (2, 0)}, clock, demo_sd=handle)
    assert [one.id for one in await seen.reports()] == ["r1", "r2"]
    handle.values = (report("r2", running=1), LATE)
    clock.now += 2
    shown = await seen.reports()
    assert shown == (report("r2", running=1), report("r1", waiting=3, state="SILENT"))
    handle.values = (report("r1"), report("r2"))
    clock.now += 2
    assert {one.state for one in await seen.reports()} == {"RUNNING"}


async def test_a_replica_that_is_gone_is_not_shown_as_silent() -> None:
    handle, clock = Handle(report("r1"), report("r2")), Clock(100.0)
    seen = fleet({"demo/sd": (1, 1)}, clock, demo_sd=handle)
    await seen.reports()
    handle.values = (report("r1"),)
    clock.now += 2
    assert [(one.id, one.state) for one in await seen.reports()] == [("r1", "RUNNING"), ("starting-1", "STARTING")]


async def test_while_serve_is_late_too_all_are_shown_that_it_last_counted() -> None:
    handle, clock, counted = Handle(report("r1", waiting=3), LATE), Clock(100.0), [ReplicaCount(2, 1)]

    def counts() -> dict[str, ReplicaCount]:
        if not counted:
            raise TimeoutError
        return {"demo/sd": counted.pop()}

    by_base: Any = {"demo/sd": handle}
    seen = Fleet(by_base, ReplicaCounts(counts, clock=clock, answer_timeout_s=60.0), clock=clock)
    # One that this ingress has not heard of yet runs all the same.
    shown = [(one.id, one.state) for one in await seen.reports()]
    assert shown == [("r1", "RUNNING"), ("silent-1", "SILENT"), ("starting-1", "STARTING")]
    handle.values = (LATE, report("r2"))
    clock.now += 2
    shown = [(one.id, one.state) for one in await seen.reports()]
    assert shown == [("r2", "RUNNING"), ("r1", "SILENT"), ("starting-1", "STARTING")]
    handle.values = (LATE, LATE)
    clock.now += 2
    assert (await seen.reports())[:2] == (report("r2", state="SILENT"), report("r1", waiting=3, state="SILENT"))


async def test_replicas_are_asked_once_a_second_however_many_want_to_know() -> None:
    handle, clock = Handle(report("r1")), Clock(100.0)
    seen = fleet({}, clock, demo_sd=handle)
    await asyncio.gather(*(seen.reports() for _ in range(10)))
    clock.now += 1
    await seen.reports()
    assert len(handle.calls) == 1
    await seen.reports(is_fresh=True)
    clock.now += 1.1
    await seen.reports()
    assert len(handle.calls) == 3


async def test_all_replicas_of_all_bases_are_told_to_forget() -> None:
    one, other = Handle("r1", ValueError("gone")), Handle()
    seen = fleet({}, demo_sd=one, big=other)
    assert await seen.forget("me/style") == ("r1",)
    assert one.calls == other.calls == [("forget_adapter", "me/style")]


async def test_a_preload_that_some_replica_managed_is_done() -> None:
    seen = fleet({}, demo_sd=Handle("r1", ModelNotFound("me/style"), "r3"))
    assert await seen.preload(SPEC, ["r1", "r2", "r3"], token=None) == ("r1", "r3")


async def test_a_preload_waits_for_those_who_fetch_and_for_nobody_who_was_not_meant() -> None:
    handle = Handle(LATE, LATE, None, then=("r1", LATE, None))
    assert await fleet({}, demo_sd=handle).preload(SPEC, ["r1"], token=None) == ("r1",)
    assert (handle.looks, len(handle.calls)) == (2, 1)


async def test_a_preload_that_nobody_managed_says_why() -> None:
    with pytest.raises(ModelNotFound):
        await fleet({}, demo_sd=Handle(ModelNotFound("me/style"))).preload(SPEC, ["r1"], token=None)
    with pytest.raises(NotReady):
        await fleet({}, demo_sd=Handle()).preload(SPEC, ["r1"], token=None)
