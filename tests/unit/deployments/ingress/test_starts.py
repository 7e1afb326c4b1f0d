"""Callers of a base without a replica: they hear when there will be one, or at once that it is not worth the wait."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any, cast

import pytest

from serve_app.catalog.replica_report import BaseState
from serve_app.core import Starting, WallClockDeadline
from serve_app.deployments.ingress import starts
from serve_app.deployments.ingress.starts import Starts, Wishes
from serve_app.errors import BaseUnusable, NotReady
from tests.clock import Clock

BASE = "owner/base"
RUNS, STOPPED = BaseState("running", expected_s=0.0), BaseState("stopped", expected_s=19.2)
NO_ROOM = BaseState("waiting", 0.0, reason="no node has room")
UNUSABLE = BaseState("failed", reason="it makes videos")


class Bases:
    """What a base does, one answer after the other, the last for ever; and what becomes of those who ask for it."""

    def __init__(self, *states: BaseState) -> None:
        self.states = list(states)
        self.asked = 0
        self.asked_twice = threading.Event()
        self.wished: list[str] = []
        self.waits: list[str] = []
        self.is_known_to_run = False
        self.clock = Clock(1000.0)

    async def __call__(self) -> Mapping[str, BaseState]:
        self.asked += 1
        if self.asked == 2:
            self.asked_twice.set()
        return {BASE: self.states.pop(0) if len(self.states) > 1 else self.states[0]}

    def starts(self) -> Starts:
        return Starts(
            self,
            self.wished.append,
            on_waited=lambda _, outcome: self.waits.append(outcome),
            runs=lambda _: self.is_known_to_run,
            clock=self.clock,
        )


def due(left_s: float, *, waits: bool = True) -> WallClockDeadline:
    return WallClockDeadline(1000.0 + left_s, left_s, waits)


@pytest.fixture(autouse=True)
def _asks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starts, "POLL_S", 0.01)
    monkeypatch.setattr(starts, "GONE_POLL_S", 0.01)


async def _forever() -> None:
    await asyncio.Event().wait()


async def _silence() -> AsyncIterator[int]:
    await _forever()
    yield 1


async def test_who_waits_for_a_base_that_fails_is_told_why() -> None:
    bases = Bases(BaseState("starting"), UNUSABLE)
    with pytest.raises(BaseUnusable, match=f"{BASE} cannot be served: it makes videos"):
        await bases.starts().result(BASE, _forever(), due(60))
    assert (bases.asked, bases.waits) == (2, ["failed"])


async def test_who_waits_in_front_of_replicas_is_told_that_their_application_is_gone() -> None:
    bases = Bases(RUNS, RUNS, RUNS, BaseState("failed", reason="there is no application base", is_absent=True))
    with pytest.raises(BaseUnusable, match="there is no application base"):
        await bases.starts().result(BASE, _forever(), due(60))


async def test_a_stream_of_a_base_that_fails_is_told_why() -> None:
    with pytest.raises(BaseUnusable, match="it makes videos"):
        async for _ in Bases(UNUSABLE).starts().events(BASE, _silence()):
            pass


async def test_who_waits_for_a_base_that_starts_gets_what_it_makes() -> None:
    bases, ready = Bases(STOPPED, RUNS), asyncio.Event()

    async def work() -> str:
        await ready.wait()
        return "an image"

    waiting = asyncio.create_task(bases.starts().result(BASE, work(), due(60)))
    await asyncio.to_thread(bases.asked_twice.wait, 60)
    ready.set()
    assert await waiting == "an image"
    assert (bases.waits, bases.wished) == (["started"], [])


async def test_nobody_is_asked_about_a_base_that_is_known_to_run() -> None:
    bases = Bases(STOPPED)
    bases.is_known_to_run = True

    async def work() -> str:
        return "an image"

    assert await bases.starts().result(BASE, work(), due(1, waits=False)) == "an image"
    assert bases.asked == 0


async def test_a_stream_is_told_what_is_expected_whenever_that_changes_and_then_gets_all_its_events() -> None:
    bases, ready = Bases(STOPPED, STOPPED, NO_ROOM, BaseState("starting", 0.0, 7.0), RUNS), asyncio.Event()

    async def events() -> AsyncIterator[int]:
        await ready.wait()
        for number in range(3):
            yield number

    seen: list[int | Starting] = []
    async for event in bases.starts().events(BASE, events(), due(600)):
        seen.append(event)
        if event == Starting(7.0):
            ready.set()
    assert seen == [Starting(19.2), Starting(None, has_room=False), Starting(7.0), 0, 1, 2]


async def test_a_stream_of_a_base_that_runs_gives_its_events_alone() -> None:
    async def events() -> AsyncIterator[int]:
        for number in range(3):
            yield number

    assert [event async for event in Bases(RUNS).starts().events(BASE, events(), due(60))] == [0, 1, 2]


@pytest.mark.parametrize(
    ("state", "patience", "says"),
    [
        (STOPPED, due(19.0), "owner/base is starting; try again in 21 s"),
        (STOPPED, due(600, waits=False), "owner/base is starting; try again in 21 s"),
        (BaseState("starting", 0.0, 0.4), due(600, waits=False), "owner/base is starting; try again in 2 s"),
        (BaseState("starting", 0.0), due(600, waits=False), "owner/base is starting; try again in 10 s"),
        (BaseState("starting", 0.0), due(0.3), "owner/base is starting; try again in 10 s"),
        (replace(NO_ROOM, expected_s=19.2), due(19), "owner/base waits for a node with room for it; try again in 50 s"),
        (NO_ROOM, due(600, waits=False), "owner/base waits for a node with room for it; try again in 30 s"),
    ],
)
async def test_who_would_wait_in_vain_is_told_at_once_when_to_come_back_and_the_base_starts_all_the_same(
    state: BaseState, patience: WallClockDeadline, says: str
) -> None:
    bases = Bases(state)
    with pytest.raises(NotReady) as caught:
        await bases.starts().result(BASE, _forever(), patience)
    assert str(caught.value) == says
    assert (bases.asked, bases.wished, bases.waits) == (1, [BASE], ["refused"])


async def test_who_waits_is_told_shortly_before_its_deadline_that_the_base_still_starts() -> None:
    bases = Bases(BaseState("starting", 0.0))
    waiting = asyncio.create_task(bases.starts().result(BASE, _forever(), due(60)))
    await asyncio.to_thread(bases.asked_twice.wait, 60)
    bases.clock.now += 59.6
    with pytest.raises(NotReady, match="is starting; try again in 10 s"):
        await waiting


async def test_a_base_of_which_serve_s_news_are_old_is_asked_about_once_more() -> None:
    bases = Bases(RUNS, STOPPED)
    with pytest.raises(NotReady):
        await bases.starts().result(BASE, _forever(), due(1))


async def test_who_leaves_stops_the_work() -> None:
    started, stopped = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        started.set()
        try:
            await _forever()
        finally:
            stopped.set()

    waiting = asyncio.create_task(Bases(STOPPED).starts().result(BASE, work()))
    await started.wait()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert stopped.is_set()


class Handle:
    """A handle whose calls wait for a replica until the test lets one run."""

    def __init__(self) -> None:
        self.calls: list[asyncio.Future[None]] = []

    @property
    def report(self) -> Handle:
        return self

    def remote(self) -> asyncio.Future[None]:
        self.calls.append(asyncio.get_running_loop().create_future())
        return self.calls[-1]


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_a_base_is_wished_for_by_one_call_until_it_is_there() -> None:
    handle = Handle()
    wishes = Wishes(cast(Any, {BASE: handle}))
    for _ in range(3):
        wishes.wish(BASE)
        await settled()
    assert len(handle.calls) == 1
    handle.calls[0].set_result(None)
    await settled()
    wishes.wish(BASE)
    await settled()
    assert len(handle.calls) == 2
    handle.calls[1].set_result(None)
    await settled()


async def test_a_base_for_which_nobody_comes_back_is_wished_for_no_more() -> None:
    handle = Handle()
    Wishes(cast(Any, {BASE: handle}), patience_s=0.001).wish(BASE)
    await settled()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(handle.calls[0], 60)
