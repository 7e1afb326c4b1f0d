"""The one keeper of what keys with limits have under way, which every ingress replica asks.

Owns the single-replica deployment around the books, and the way to it. It remembers nothing on disk: after its end the
ingress replicas tell a new one what is under way, and what was spent on rates and images is forgotten.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from serve_app.api.http.limits import UNLIMITED
from serve_app.config import AppConfig
from serve_app.deployments.limits.lease_table import Heartbeat, LeaseTable, RequestLease
from serve_app.deployments.limits.shared_rate_limiter import PATIENCE_S, KeeperAway
from serve_app.deployments.shared.logs import set_up_logging
from serve_app.errors import KeyLimitReached, LoraplexError

# Whoever asks goes on with its share of the limits after this.
ANSWER_TIMEOUT_S = 2.0


def is_needed(config: AppConfig) -> bool:
    """Whether keys may have limits that several ingress replicas must count together."""
    auth = config.auth
    has_limits = auth.keys_file is not None or any(key.limits != UNLIMITED for key in auth.keys)
    return has_limits and config.ingress.replicas > 1


# Its callers ask at each request, which would fill the access log.
@serve.deployment(logging_config={"enable_access_log": False})
class LimitKeeper:
    """Holds the books; everything happens on one event loop, and so one after the other."""

    def __init__(self, log_level: str) -> None:
        set_up_logging(log_level)
        self._books = LeaseTable(clock=time.monotonic, patience_s=PATIENCE_S)

    async def begin(self, holder: str, lease: RequestLease) -> KeyLimitReached | None:
        """Let a request in, or return why not."""
        return self._books.begin(holder, lease)

    async def spend(self, holder: str, lease: RequestLease, count: int) -> LoraplexError | None:
        """Take images off what the key of a request may draw, or return why not."""
        return self._books.spend(holder, lease, count)

    async def end(self, holder: str, number: int, *, drew: bool) -> None:
        """Note that a request is over."""
        self._books.end(holder, number, drew=drew)

    async def apply_heartbeat(self, beat: Heartbeat) -> None:
        """Put the books of a holder right."""
        self._books.apply_heartbeat(beat)

    async def under_way(self) -> int:
        """Return how many requests are under way."""
        return self._books.under_way


class RateLimitClient:
    """The way to the keeper from another process; every method raises `KeeperAway` where no answer comes in time."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def begin(self, holder: str, lease: RequestLease) -> KeyLimitReached | None:
        """Let a request in, or return why not."""
        return await _answer(self._handle.begin.remote(holder, lease))

    async def spend(self, holder: str, lease: RequestLease, count: int) -> LoraplexError | None:
        """Take images off what the key of a request may draw, or return why not."""
        return await _answer(self._handle.spend.remote(holder, lease, count))

    async def end(self, holder: str, number: int, *, drew: bool) -> None:
        """Note that a request is over."""
        await _answer(self._handle.end.remote(holder, number, drew=drew))

    async def apply_heartbeat(self, beat: Heartbeat) -> None:
        """Put the books of a holder right."""
        await _answer(self._handle.apply_heartbeat.remote(beat))


# A response has other types with streams than without, which Ray's own types mix.
async def _answer(response: Any) -> Any:
    asking = asyncio.ensure_future(_awaited(response))
    try:
        await asyncio.wait({asking}, timeout=ANSWER_TIMEOUT_S)
        if asking.done():
            return asking.result()
        raise KeeperAway
    finally:
        if not asking.done():
            response.cancel()
            asking.cancel()


async def _awaited(response: Any) -> Any:
    try:
        return await response
    except (RayError, RayServeException):
        raise KeeperAway from None
