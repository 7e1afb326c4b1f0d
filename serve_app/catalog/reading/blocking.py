"""Blocking calls away from the event loop, under a deadline."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


async def run_blocking(call: Callable[[], T], *, timeout_s: float | None = None) -> T:
    """Return what `call` returns, run in a thread of its own.

    A thread per call, where a pool would do for work that ends: calls that hang must not keep others waiting
    for a worker, nor the process from ending. A call that runs out of its time is left to end by itself.

    Raises:
        TimeoutError: the call took longer than `timeout_s`.
    """
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[T] = loop.create_future()

    def deliver(value: T | None, error: BaseException | None) -> None:
        if outcome.done():
            return
        if error is not None:
            outcome.set_exception(error)
        else:
            outcome.set_result(value)  # type: ignore[arg-type]

    def run() -> None:
        value, error = None, None
        try:
            value = call()
        except BaseException as raised:  # noqa: BLE001 - handed to anyone who awaits
            error = raised
        # The loop may have been closed meanwhile: then no caller waits.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(deliver, value, error)

    threading.Thread(target=run, name="catalog", daemon=True).start()
    return await asyncio.wait_for(outcome, timeout_s)
