"""Waiting for an answer only as long as somebody wants it.

Owns the race between the service, the caller hanging up and the deadline.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import Request

from serve_app.errors import DeadlineExceeded

T = TypeVar("T")


class CallerGone(Exception):
    """The caller hung up: nobody will read a reply."""


async def while_connected(request: Request, call: Coroutine[Any, Any, T], *, timeout_s: float) -> T:
    """Return what a call returns; cancel it, and wait until it lets go, if the caller leaves or time is out.

    The request's body must have been read.

    Raises:
        CallerGone: the caller hung up.
        DeadlineExceeded: the call took longer than `timeout_s`.
    """
    work = asyncio.ensure_future(call)
    gone = asyncio.ensure_future(_hung_up(request))
    try:
        await asyncio.wait({work, gone}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if work.cancelled():
            raise RuntimeError("the service cancelled a call that nobody had given up")
        if work.done():
            return work.result()
        if gone.done():
            raise CallerGone
        raise DeadlineExceeded(timeout_s)
    finally:
        work.cancel()
        gone.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
