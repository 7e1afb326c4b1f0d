"""Bases without a running replica: their callers are told when there will be one, or why there will be none.

Owns when Serve is asked, who waits and who is refused, and that a base whose callers were refused starts all the same.
Must not know what is waited for.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any, Literal, TypeVar

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from serve_app.catalog.replica_report import BaseState
from serve_app.core import Starting, WallClockDeadline
from serve_app.errors import BaseUnusable, NotReady
from serve_app.routing.known import replicas_known

T = TypeVar("T")
Outcome = Literal["started", "refused", "failed"]
POLL_S = 1.0
# Who waits is told so long before its deadline that its base still starts: at the deadline nobody would know why.
MARGIN_S = 0.5
# When to come back, where it is not known how long a start takes, and how long to wait for room before it.
UNKNOWN_S = 10
NO_ROOM_S = 30
# Who comes back to the second finds a replica.
SLACK_S = 1
# Who waits for a replica that runs looks so often whether its application is still there.
GONE_POLL_S = 2.0
# A base is kept starting for so long for callers that were refused.
WISH_S = 600.0


class Starts:
    """The wait for bases without a running replica."""

    def __init__(
        self,
        states: Callable[[], Awaitable[Mapping[str, BaseState]]],
        wish: Callable[[str], None],
        *,
        on_waited: Callable[[str, Outcome], None] = lambda base, outcome: None,
        runs: Callable[[str], bool] = lambda base: replicas_known(base) > 0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`wish` has a base start without a request; `runs` knows at once of bases that do, if not of all; `clock` is
        in seconds since 1970."""
        self._states = states
        self._wish = wish
        self._on_waited = on_waited
        self._runs = runs
        self._clock = clock

    async def result(self, base: str, work: Awaitable[T], due: WallClockDeadline | None = None) -> T:
        """Return what comes of `work`, which a replica of the base does once one runs.

        Raises:
            BaseUnusable: none runs, and the last that was started said that none can.
            NotReady: none will run before the deadline, or soon enough for a caller that does not wait.
        """
        waited = asyncio.ensure_future(_result(work))
        try:
            async with aclosing(self._told(base, waited, due)) as told:
                async for _ in told:
                    pass
            await self._wait_while_there(base, waited)
            return await waited
        finally:
            await _let_go(waited)

    async def events(
        self, base: str, events: AsyncIterable[T], due: WallClockDeadline | None = None
    ) -> AsyncGenerator[T | Starting]:
        """Yield events, before the first of them what is expected of a base that starts; raises as `result` does."""
        iterator = aiter(events)
        first = asyncio.ensure_future(_result(anext(iterator)))
        try:
            async with aclosing(self._told(base, first, due)) as told:
                async for starting in told:
                    yield starting
            await self._wait_while_there(base, first)
            try:
                yield await first
            except StopAsyncIteration:
                return
        finally:
            await _let_go(first)
        async for event in iterator:
            yield event

    async def is_running(self, base: str) -> bool:
        """Whether a replica of a base runs."""
        return self._runs(base) or (await self._state(base)).state == "running"

    async def check(self, base: str) -> None:
        """Refuse what is for a base that cannot be served.

        Raises:
            BaseUnusable: with the reason.
        """
        state = await self._state(base)
        if state.state == "failed":
            raise unusable(base, state)

    async def _wait_while_there(self, base: str, work: asyncio.Future[Any]) -> None:
        """Return once the work is done. Serve lets what waits in a handle wait for ever once the application is gone.

        Raises:
            BaseUnusable: the application is gone.
        """
        while not (await asyncio.wait({work}, timeout=GONE_POLL_S))[0]:
            if (await self._state(base)).is_absent:
                await self.check(base)

    async def _told(
        self, base: str, work: asyncio.Future[Any], due: WallClockDeadline | None
    ) -> AsyncGenerator[Starting]:
        """Yield what is expected of a base whenever that changes, until a replica of it runs or the work is done."""
        told: Starting | None = None
        running = 0
        # Serve's news are up to a second old: a base that has just stopped still runs in the first of them.
        while running < 2 and not work.done() and not self._runs(base):
            asked = asyncio.ensure_future(self._state(base))
            try:
                await asyncio.wait({work, asked}, return_when=asyncio.FIRST_COMPLETED)
                if work.done():
                    break
                state = asked.result()
            finally:
                await _let_go(asked)
            running += state.state == "running"
            pause_s = POLL_S
            if state.state != "running":
                pause_s = min(POLL_S, self._checked_s(base, state, due))
                starting = Starting(state.expected_s, has_room=state.state != "waiting")
                if told is None or told.has_room != starting.has_room:
                    yield starting
                    told = starting
            await asyncio.wait({work}, timeout=pause_s)
        if told is not None:
            self._on_waited(base, "started")

    async def _state(self, base: str) -> BaseState:
        return (await self._states()).get(base, BaseState("starting"))

    def _checked_s(self, base: str, state: BaseState, due: WallClockDeadline | None) -> float:
        """Return the seconds for which a caller may be left waiting.

        Raises:
            BaseUnusable, NotReady: it should not wait at all.
        """
        if state.state == "failed":
            self._on_waited(base, "failed")
            raise unusable(base, state)
        if due is None:
            return POLL_S
        left_s = due.at - self._clock() - MARGIN_S
        if not due.waits_for_start or left_s <= 0 or (state.expected_s or 0.0) > left_s:
            self._wish(base)
            self._on_waited(base, "refused")
            raise not_ready(base, state)
        return left_s


def unusable(base: str, state: BaseState) -> BaseUnusable:
    """Return what to tell a caller of a base that has failed."""
    return BaseUnusable(base, state.reason or "it does not start")


def not_ready(base: str, state: BaseState) -> NotReady:
    """Return what to tell a caller of a base that does not run."""
    if state.state == "waiting":
        return NotReady(base, NO_ROOM_S + math.ceil(state.expected_s or 0.0), "waits for a node with room for it")
    return NotReady(base, UNKNOWN_S if state.expected_s is None else math.ceil(state.expected_s) + SLACK_S)


class Wishes:
    """Bases that start although no request waits for them: a call that waits in Serve's handle asks for a replica."""

    def __init__(self, handles: Mapping[str, DeploymentHandle], *, patience_s: float = WISH_S) -> None:
        self._handles = handles
        self._patience_s = patience_s
        self._wished: dict[str, asyncio.Task[None]] = {}

    def wish(self, base: str) -> None:
        """Have a base start, if it is not wished for already."""
        if base not in self._wished:
            self._wished[base] = asyncio.create_task(self._until_there(base))
            self._wished[base].add_done_callback(lambda _: self._wished.pop(base))

    async def _until_there(self, base: str) -> None:
        # Any call would do; where the queue is full, there are requests enough.
        response = self._handles[base].report.remote()
        with contextlib.suppress(RayError, RayServeException, TimeoutError):
            await asyncio.wait_for(_result(response), self._patience_s)
        response.cancel()


async def _result(work: Awaitable[T]) -> T:
    return await work


async def _let_go(future: asyncio.Future[Any]) -> None:
    future.cancel()
    await asyncio.gather(future, return_exceptions=True)
