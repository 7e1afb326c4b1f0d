"""Limits of keys counted in Redis, for a service of several ingress replicas.

Owns what is asked of the `limits` library, and what is granted while Redis does not answer. Requests at once are
counted here, as this replica's share: those of a replica that died could not be given back.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from limits import RateLimitItem, RateLimitItemPerMinute, RateLimitItemPerSecond
from limits.aio.storage import RedisStorage
from limits.aio.strategies import MovingWindowRateLimiter
from limits.errors import StorageError

from serve_app.api.http.limits import Grant, KeyQuotas, LocalRateLimiter
from serve_app.config import KeyLimits
from serve_app.errors import KeyLimitReached, OutOfBounds

log = logging.getLogger(__name__)

T = TypeVar("T")

# Redis answers in a millisecond; after this a request goes by the replica's share.
ANSWER_TIMEOUT_S = 1.0


class RedisRateLimiter:
    """Counts requests and images of each key over all ingress replicas; requests at once as a share of the limit."""

    def __init__(self, url: str, *, share: float) -> None:
        """`url` is that of Redis; `share` is the part of a limit that is granted here where Redis cannot count."""
        storage = RedisStorage(
            f"async+{url}",
            wrap_exceptions=True,
            implementation="redispy",
            socket_timeout=ANSWER_TIMEOUT_S,
            socket_connect_timeout=ANSWER_TIMEOUT_S,
        )
        self._windows = MovingWindowRateLimiter(storage)
        self._at_once = KeyQuotas(clock=time.monotonic, share=share)
        self._shares = LocalRateLimiter(clock=time.monotonic, share=share)
        self._is_away = False

    async def begin(self, key: str, limits: KeyLimits) -> Grant:
        """Let a request in.

        Raises:
            KeyLimitReached: it came too soon, or too many are under way.
        """
        quota = self._at_once.of(key, KeyLimits(concurrency=limits.concurrency))
        quota.begin()
        try:
            if (rate_s := limits.requests_per_s) is not None:
                burst = limits.burst or max(1, math.ceil(rate_s))
                item = RateLimitItemPerSecond(burst, max(1, math.ceil(burst / rate_s)))
                await self._spend(item, key, 1, f"{rate_s:g} requests per second")
        except _RedisAway:
            quota.end()
            return await self._shares.begin(key, limits)
        except BaseException:
            quota.end()
            raise
        return _RedisGrant(self, key, limits, quota.end)

    async def spend_images(self, key: str, limits: KeyLimits, count: int) -> None:
        """Take images off what a key may draw; they do not come back. While Redis does not answer they are free.

        Raises:
            KeyLimitReached: so many may not be drawn yet.
            OutOfBounds: so many may never be drawn at once.
        """
        limit = limits.images_per_minute
        if limit is None:
            return
        if count > limit:
            raise OutOfBounds("num_images_per_prompt", count, f"at most {limit}, which the key may draw in a minute")
        try:
            await self._spend(RateLimitItemPerMinute(limit), key, count, f"{limit} images per minute")
        except _RedisAway:
            return

    async def _spend(self, item: RateLimitItem, key: str, count: int, what: str) -> None:
        if await self._answer(self._windows.hit(item, key, cost=count)):
            return
        window = await self._answer(self._windows.get_window_stats(item, key))
        raise KeyLimitReached(key, what, max(1, math.ceil(window.reset_time - time.time())))

    async def _answer(self, asked: Awaitable[T]) -> T:
        try:
            answer = await asyncio.wait_for(asked, ANSWER_TIMEOUT_S)
        except (StorageError, OSError, TimeoutError) as error:
            if not self._is_away:
                log.warning("Redis does not count the limits of keys (%s); shares hold", type(error).__name__)
            self._is_away = True
            raise _RedisAway from None
        if self._is_away:
            log.info("Redis counts the limits of keys again")
        self._is_away = False
        return answer


class _RedisAway(Exception):
    """Redis gave no answer in time."""


class _RedisGrant:
    """One request that was let in."""

    def __init__(self, limiter: RedisRateLimiter, key: str, limits: KeyLimits, on_end: Callable[[], None]) -> None:
        self._limiter, self._key, self._limits, self._on_end = limiter, key, limits, on_end

    async def spend_images(self, count: int) -> None:
        """Take images off."""
        await self._limiter.spend_images(self._key, self._limits, count)

    def end(self, *, drew: bool) -> None:
        """Count the request no more; its images stay spent."""
        self._on_end()
