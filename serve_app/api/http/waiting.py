"""Waits for an answer only while its caller does.

Owns the race between the service, the caller hanging up and the deadline, which nothing behind the HTTP layer keeps
a second time.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Coroutine
from dataclasses import dataclass, replace
from typing import Any, TypeVar, get_args

from starlette.requests import Request

from serve_app.api.http.openapi_responses import header_parameter
from serve_app.api.http.validation import clip
from serve_app.core import Priority, UnresolvedRequest, WallClockDeadline
from serve_app.errors import DeadlineExceeded, MalformedRequest, OutOfBounds

T = TypeVar("T")

TIMEOUT_HEADER = "x-request-timeout-s"
TIMEOUT_PARAMETER = header_parameter(
    TIMEOUT_HEADER,
    "seconds after which the request is stopped and answered with 504",
    type="number",
    exclusiveMinimum=0,
)
# Hugging Face's clients know it; older ones send "1".
WAIT_HEADER = "x-wait-for-model"
_WAITS = {"": True, "true": True, "1": True, "false": False, "0": False}
WAIT_PARAMETER = header_parameter(
    WAIT_HEADER,
    "'false': where no replica of the base runs, the answer is 503 at once; one starts all the same",
    type="string",
    enum=["true", "false"],
)


class ClientDisconnected(Exception):
    """The caller hung up and will read no reply."""


@dataclass(frozen=True, slots=True)
class Deadline:
    """When a request must be answered: `limit_s` after it began, at `ends_at` on `time.monotonic`.

    `waits_for_start` is False for a caller that does not wait for a base without a running replica.
    """

    limit_s: float
    ends_at: float
    waits_for_start: bool = True

    @property
    def left_s(self) -> float:
        """Seconds until then, 0 where it has passed."""
        return max(0.0, self.ends_at - time.monotonic())


def deadline_of(request: Request, max_s: float) -> Deadline:
    """Return a request's deadline: its own, else the longest allowed.

    Raises:
        MalformedRequest: the header is no number.
        OutOfBounds: it asks for more than `max_s`, or for nothing; or the other header is neither true nor false.
    """
    waits = _WAITS.get(request.headers.get(WAIT_HEADER, "").strip().lower())
    if waits is None:
        raise OutOfBounds(WAIT_HEADER, clip(request.headers[WAIT_HEADER]), "true or false")
    asked = request.headers.get(TIMEOUT_HEADER, "").strip()
    try:
        limit_s = float(asked) if asked else max_s
    except ValueError:
        raise MalformedRequest(f"the header '{TIMEOUT_HEADER}' must be a number of seconds") from None
    # NaN is in no range.
    if not 0 < limit_s <= max_s:
        shown = limit_s if math.isfinite(limit_s) else asked[:20]
        raise OutOfBounds(TIMEOUT_HEADER, shown, f"over 0 and at most {max_s:g}")
    return Deadline(limit_s, time.monotonic() + limit_s - request_age_s(request), waits)


async def run_until_disconnect(request: Request, call: Coroutine[Any, Any, T], *, deadline: Deadline) -> T:
    """Return what a call returns; cancel it, and wait until it has ended, if the caller leaves or time is out.

    The request's body must have been read.

    Raises:
        ClientDisconnected: the caller hung up.
        DeadlineExceeded: the deadline passed.
    """
    gone = asyncio.ensure_future(_hung_up(request))
    try:
        return await _unless(gone, asyncio.ensure_future(call), deadline)
    finally:
        await _let_go(gone)


async def each_while_connected(request: Request, events: AsyncGenerator[T], *, deadline: Deadline) -> AsyncGenerator[T]:
    """Yield what a generator yields; close it, and wait until it has ended, if the caller leaves or time is out.

    The request's body must have been read.

    Raises:
        ClientDisconnected: the caller hung up.
        DeadlineExceeded: the deadline passed.
    """
    gone = asyncio.ensure_future(_hung_up(request))
    try:
        while True:
            try:
                event = await _unless(gone, asyncio.ensure_future(anext(events)), deadline)
            except StopAsyncIteration:
                return
            yield event
    finally:
        await _let_go(gone)
        await events.aclose()


async def _unless(gone: asyncio.Future[None], work: asyncio.Future[T], deadline: Deadline) -> T:
    """Return the result of `work`, which is cancelled where `gone` or the deadline comes first."""
    try:
        await asyncio.wait({work, gone}, timeout=deadline.left_s, return_when=asyncio.FIRST_COMPLETED)
        if work.cancelled():
            raise RuntimeError("the service cancelled a call that nobody had given up")
        if work.done():
            return work.result()
        if gone.done():
            raise ClientDisconnected
        raise DeadlineExceeded(deadline.limit_s)
    finally:
        await _let_go(work)


async def _let_go(future: asyncio.Future[Any]) -> None:
    future.cancel()
    await asyncio.gather(future, return_exceptions=True)


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


# How long ago the request came.
AGE_HEADER = "x-request-age-s"
# The seed that its stream had told before it broke off.
SEED_HEADER = "x-request-seed"
PROXY_HEADERS = (AGE_HEADER, SEED_HEADER)


def request_age_s(request: Request) -> float:
    """Return how many seconds ago a request came for the first time; 0 for one that is sent once."""
    try:
        age_s = float(request.headers.get(AGE_HEADER, 0))
    except ValueError:
        return 0.0
    return age_s if 0 < age_s < math.inf else 0.0


def with_retry_seed(unresolved: UnresolvedRequest, request: Request) -> UnresolvedRequest:
    """Return the request with the seed that it had when it was sent before, if it was and had one."""
    seed = request.headers.get(SEED_HEADER, "")
    return replace(unresolved, seed=int(seed)) if seed.isdecimal() and len(seed) < 20 else unresolved


PRIORITY_HEADER = "x-priority"
_PRIORITIES: tuple[Priority, ...] = get_args(Priority)
PRIORITY_PARAMETER = header_parameter(
    PRIORITY_HEADER,
    "'batch' lets interactive requests go first, within a bound; 'interactive' where it is absent",
    type="string",
    enum=list(_PRIORITIES),
)


def priority_of(request: Request) -> Priority:
    """Return the priority that a request asks for.

    Raises:
        OutOfBounds: there is no such priority.
    """
    asked = request.headers.get(PRIORITY_HEADER, "").strip() or "interactive"
    for known in _PRIORITIES:
        if asked == known:
            return known
    raise OutOfBounds(PRIORITY_HEADER, clip(asked), " or ".join(_PRIORITIES))


def with_scheduling(unresolved: UnresolvedRequest, *, priority: Priority, deadline: Deadline) -> UnresolvedRequest:
    """Return the request with its place in the queue; its deadline is put in the time that all nodes share."""
    due = WallClockDeadline(time.time() + deadline.left_s, deadline.limit_s, deadline.waits_for_start)
    return replace(unresolved, priority=priority, due=due)
