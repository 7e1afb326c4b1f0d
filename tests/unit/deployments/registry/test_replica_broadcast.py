from __future__ import annotations

import asyncio
from typing import Any

import pytest

from serve_app.catalog.replica_report import ReplicaReport
from serve_app.core import AdapterSpec
from serve_app.deployments.registry.fleet import ReplicaBroadcast, ReplicaCount
from serve_app.errors import ModelNotFound, NotReady

SPEC = AdapterSpec("me/style", "demo/sd", "r1", "f", "folder", "me/style", 1)


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for the thread that counts, however late it gets its turn."""
    monkeypatch.setattr("serve_app.deployments.registry.fleet.COUNTS_TIMEOUT_S", 60.0)


class Answer:
    """One replica's answer to a broadcast, as Serve hands it over: a value, an error, or nothing for ever."""

    def __init__(self, value: Any) -> None:
        self._value = value
        self.is_cancelled = False

    async def get_async(self) -> Any:
        if self._value is None:
            await asyncio.Event().wait()
        if isinstance(self._value, Exception):
            raise self._value
        return self._value

    def cancel(self) -> None:
        self.is_cancelled = True


class Handle:
    """A deployment whose replicas answer a broadcast with what `values` hold."""

    def __init__(self, *values: Any) -> None:
        self.values = values
        self.calls: list[tuple[Any, ...]] = []
        self.answers: list[Answer] = []

    def broadcast(self, *call: Any) -> Handle:
        self.calls.append(call)
        return self

    async def _fetch_replica_results_async(self) -> list[Answer]:
        self.answers = [Answer(value) for value in self.values]
        return self.answers


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def roll_call(counts: dict[str, tuple[int, int]], clock: Clock | None = None, **handles: Handle) -> ReplicaBroadcast:
    by_base: Any = {base.replace("_", "/"): handle for base, handle in handles.items()}
    known = {base: ReplicaCount(*count) for base, count in counts.items()}
    return ReplicaBroadcast(by_base, lambda: known, clock=clock or Clock(), answer_timeout_s=0.05)


def report(name: str, **fields: Any) -> ReplicaReport:
    return ReplicaReport(name, "demo/sd", **fields)


async def test_a_replica_that_hangs_hides_nobody_and_is_shown_as_it_was() -> None:
    handle, clock = Handle(report("r2"), report("r1", waiting=3)), Clock()
    calls = roll_call({"demo/sd": (2, 0)}, clock, demo_sd=handle)
    assert [one.id for one in await calls.reports()] == ["r1", "r2"]
    handle.values = (report("r2", running=1), None)
    clock.now += 2
    shown = await calls.reports()
    assert shown == (report("r2", running=1), report("r1", waiting=3, state="SILENT"))
    assert [answer.is_cancelled for answer in handle.answers] == [False, True]
    handle.values = (report("r1"), report("r2"))
    clock.now += 2
    assert {one.state for one in await calls.reports()} == {"RUNNING"}


async def test_a_replica_that_is_gone_is_not_shown_as_silent() -> None:
    handle, clock = Handle(report("r1"), report("r2")), Clock()
    calls = roll_call({"demo/sd": (1, 1)}, clock, demo_sd=handle)
    await calls.reports()
    handle.values = (report("r1"),)
    clock.now += 2
    assert [(one.id, one.state) for one in await calls.reports()] == [("r1", "RUNNING"), ("starting-1", "STARTING")]


async def test_while_serve_is_late_too_all_are_shown_that_it_last_counted() -> None:
    handle, clock, counted = Handle(report("r1", waiting=3), None), Clock(), [ReplicaCount(2, 1)]

    def counts() -> dict[str, ReplicaCount]:
        if not counted:
            raise TimeoutError
        return {"demo/sd": counted.pop()}

    by_base: Any = {"demo/sd": handle}
    calls = ReplicaBroadcast(by_base, counts, clock=clock, answer_timeout_s=0.05)
    # One that this ingress has not heard of yet runs all the same.
    shown = [(one.id, one.state) for one in await calls.reports()]
    assert shown == [("r1", "RUNNING"), ("silent-1", "SILENT"), ("starting-1", "STARTING")]
    handle.values = (None, report("r2"))
    clock.now += 2
    shown = [(one.id, one.state) for one in await calls.reports()]
    assert shown == [("r2", "RUNNING"), ("r1", "SILENT"), ("starting-1", "STARTING")]
    handle.values = (None, None)
    clock.now += 2
    assert (await calls.reports())[:2] == (report("r2", state="SILENT"), report("r1", waiting=3, state="SILENT"))


async def test_replicas_are_asked_once_a_second_however_many_want_to_know() -> None:
    handle, clock = Handle(report("r1")), Clock()
    calls = roll_call({}, clock, demo_sd=handle)
    await asyncio.gather(*(calls.reports() for _ in range(10)))
    clock.now += 1
    await calls.reports()
    assert len(handle.calls) == 1
    await calls.reports(is_fresh=True)
    clock.now += 1.1
    await calls.reports()
    assert len(handle.calls) == 3


async def test_all_replicas_of_all_bases_are_told_to_forget() -> None:
    one, other = Handle("r1", ValueError("gone")), Handle()
    calls = roll_call({}, demo_sd=one, big=other)
    assert await calls.forget("me/style") == ("r1",)
    assert one.calls == other.calls == [("forget_adapter", "me/style")]


async def test_a_preload_that_some_replica_managed_is_done() -> None:
    calls = roll_call({}, demo_sd=Handle("r1", ModelNotFound("me/style"), "r3"))
    assert await calls.preload(SPEC, ["r1", "r2", "r3"], token=None) == ("r1", "r3")


async def test_a_preload_waits_for_nobody_who_was_not_meant() -> None:
    handle = Handle("r1", None)
    assert await roll_call({}, demo_sd=handle).preload(SPEC, ["r1"], token=None) == ("r1",)
    assert handle.answers[1].is_cancelled


async def test_a_preload_that_nobody_managed_says_why() -> None:
    with pytest.raises(ModelNotFound):
        await roll_call({}, demo_sd=Handle(ModelNotFound("me/style"))).preload(SPEC, ["r1"], token=None)
    with pytest.raises(NotReady):
        await roll_call({}, demo_sd=Handle()).preload(SPEC, ["r1"], token=None)
