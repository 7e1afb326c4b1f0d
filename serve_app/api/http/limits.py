"""How much a key may ask for: requests in a second, requests at once, images in a minute; and how many unknown ids.

Owns the counting, exact within one process, and what auth asks of it; `deployments.ingress.redis_limits` counts over
several ingress replicas. Must not know HTTP or which keys there are.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Protocol

from serve_app.api.http.caller import asked_by
from serve_app.config import KeyLimits
from serve_app.errors import (
    AccessDenied,
    HubUnavailable,
    KeyLimitReached,
    ModelNotFound,
    OutOfBounds,
    UnknownIdLimitReached,
)

UNLIMITED = KeyLimits()
# Past so many, those who have asked for nothing unknown lately are forgotten.
MAX_ACCOUNTS = 10_000
REFUSAL_DELAY_S = 1.0
MAX_DELAYED_REFUSALS = 8


class Grant(Protocol):
    """One request that was let in."""

    async def spend_images(self, count: int) -> None:
        """Take images off what the key may draw.

        Raises:
            KeyLimitReached: so many may not be drawn yet.
            OutOfBounds: so many may never be drawn at once.
        """
        ...

    def end(self, *, drew: bool) -> None:
        """Note that the request is over; its images come back unless it `drew` them."""
        ...


class RateLimiter(Protocol):
    """Anyone who counts what keys ask for."""

    async def begin(self, key: str, limits: KeyLimits) -> Grant:
        """Let a request in; `end` of the grant must follow.

        Raises:
            KeyLimitReached: it came too soon, or too many are under way.
        """
        ...


class TokenBucket:
    """Fills by `rate_s` a second up to `capacity`; starts full."""

    def __init__(self, rate_s: float, capacity: float, *, clock: Callable[[], float]) -> None:
        self._rate_s = rate_s
        self._capacity = capacity
        self._clock = clock
        self._level = capacity
        self._filled_at = clock()

    def wait_s(self, count: float) -> float:
        """Return in how many seconds `count` can be taken, 0 where they can be now; a count above the bucket's
        size can be taken when it is full."""
        self._fill()
        # A hair less: rounding must not refuse a caller who waited as long as told.
        return max(0.0, min(count, self._capacity) - 1e-9 - self._level) / self._rate_s

    def take(self, count: float) -> None:
        """Remove `count` tokens; the level may become negative. A negative `count` returns tokens."""
        self._level = min(self._capacity, self._level - count)

    @property
    def is_full(self) -> bool:
        """Whether a new one would be the same."""
        self._fill()
        return self._level >= self._capacity

    def _fill(self) -> None:
        now = self._clock()
        self._level = min(self._capacity, self._level + (now - self._filled_at) * self._rate_s)
        self._filled_at = now


class KeyQuota:
    """The state of one key's limits. A caller that waits `retry_after_s` seconds will be accepted, if no other caller
    uses the same key. This does not hold for the concurrency limit.

    `share` is the part of the limits that is granted here, at least one request at once and one image.
    """

    def __init__(self, key: str, limits: KeyLimits, *, clock: Callable[[], float], share: float = 1.0) -> None:
        self._key = key
        self._limits = limits
        self._running = 0
        at_once, rate_s, images = limits.concurrency, limits.requests_per_s, limits.images_per_minute
        burst = limits.burst or max(1, math.ceil(rate_s or 1))
        self._at_once = None if at_once is None else _part(at_once, share)
        self._requests = None if rate_s is None else TokenBucket(rate_s * share, _part(burst, share), clock=clock)
        self._images = None if images is None else TokenBucket(images / 60 * share, _part(images, share), clock=clock)

    @property
    def is_untouched(self) -> bool:
        """Whether a new one would be the same."""
        buckets = [bucket for bucket in (self._requests, self._images) if bucket is not None]
        return self._running == 0 and all(bucket.is_full for bucket in buckets)

    def begin(self) -> None:
        """Let a request in; `end` must follow.

        Raises:
            KeyLimitReached: it came too soon, or too many are under way.
        """
        limits = self._limits
        if self._at_once is not None and self._running >= self._at_once:
            raise KeyLimitReached(self._key, f"{limits.concurrency} requests at once", 1)
        if self._requests is not None:
            wait_s = self._requests.wait_s(1)
            if wait_s > 0:
                raise KeyLimitReached(self._key, f"{limits.requests_per_s:g} requests per second", math.ceil(wait_s))
            self._requests.take(1)
        self._running += 1

    def end(self) -> None:
        """Note that a request is answered."""
        self._running -= 1

    def spend_images(self, count: int) -> None:
        """Take images off what may be drawn.

        Raises:
            KeyLimitReached: so many may not be drawn yet.
            OutOfBounds: so many may never be drawn at once.
        """
        limit = self._limits.images_per_minute
        if self._images is None or limit is None:
            return
        if count > limit:
            raise OutOfBounds("num_images_per_prompt", count, f"at most {limit}, which the key may draw in a minute")
        wait_s = self._images.wait_s(count)
        if wait_s > 0:
            raise KeyLimitReached(self._key, f"{limit} images per minute", math.ceil(wait_s))
        self._images.take(count)

    def return_images(self, count: int) -> None:
        """Give back images that were not drawn."""
        if self._images is not None:
            self._images.take(-count)


class KeyQuotas:
    """The allowances of all keys that asked recently."""

    def __init__(self, *, clock: Callable[[], float], share: float = 1.0) -> None:
        self._clock = clock
        self._share = share
        self._known: dict[tuple[str, KeyLimits], KeyQuota] = {}

    def of(self, key: str, limits: KeyLimits) -> KeyQuota:
        """Return what a key may still do; limits that have changed start again."""
        if (key, limits) not in self._known:
            # Keys come and go; forget those with nothing counted.
            self._known = {one: known for one, known in self._known.items() if not known.is_untouched}
            self._known[key, limits] = KeyQuota(key, limits, clock=self._clock, share=self._share)
        return self._known[key, limits]


class UnknownIdLimit:
    """Counts look-ups of unknown ids, by key and by address; one that turns out to exist is free.

    Each ingress replica counts for itself: the limit bounds its own work and its requests to the Hub. A refusal waits
    for `REFUSAL_DELAY_S`, or a caller who asks on and on would cost what requests cost; few wait at a time, so that
    refused callers never fill the replica.
    """

    def __init__(
        self,
        per_minute: int,
        *,
        clock: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._clock = clock
        self._sleep = sleep
        self._delayed = 0
        self.allow(per_minute)

    def allow(self, per_minute: int) -> None:
        """Let everybody ask for so many from now on, whatever they asked for before."""
        self._per_minute = per_minute
        self._buckets: dict[str, TokenBucket] = {}

    @asynccontextmanager
    async def counting(self) -> AsyncGenerator[None]:
        """Look one id up on behalf of the caller of the request that runs.

        Raises:
            UnknownIdLimitReached: the caller asked for too many.
        """
        if len(self._buckets) > MAX_ACCOUNTS:
            self._buckets = {name: bucket for name, bucket in self._buckets.items() if not bucket.is_full}
        buckets = [self._bucket(name) for name in asked_by.get()]
        wait_s = max((bucket.wait_s(1) for bucket in buckets), default=0.0)
        if wait_s > 0:
            await self._delay()
            raise UnknownIdLimitReached(self._per_minute, math.ceil(wait_s))
        for bucket in buckets:
            bucket.take(1)
        try:
            yield
        except (ModelNotFound, AccessDenied, HubUnavailable):
            raise
        except BaseException:
            self._give_back(buckets)
            raise
        self._give_back(buckets)

    async def _delay(self) -> None:
        if self._delayed >= MAX_DELAYED_REFUSALS:
            return
        self._delayed += 1
        try:
            await self._sleep(REFUSAL_DELAY_S)
        finally:
            self._delayed -= 1

    def _bucket(self, name: str) -> TokenBucket:
        if name not in self._buckets:
            self._buckets[name] = TokenBucket(self._per_minute / 60, self._per_minute, clock=self._clock)
        return self._buckets[name]

    def _give_back(self, buckets: Sequence[TokenBucket]) -> None:
        for bucket in buckets:
            bucket.take(-1)


class LocalRateLimiter:
    """Counts within this process, and grants a share of each limit."""

    def __init__(self, *, clock: Callable[[], float], share: float = 1.0) -> None:
        """Know no key yet; `clock` is in monotonic seconds."""
        self._allowances = KeyQuotas(clock=clock, share=share)

    async def begin(self, key: str, limits: KeyLimits) -> Grant:
        """Let a request in.

        Raises:
            KeyLimitReached: it came too soon, or too many are under way.
        """
        allowance = self._allowances.of(key, limits)
        allowance.begin()
        return _LocalGrant(allowance)


class _LocalGrant:
    """One request, and the images that it took off its key's allowance."""

    def __init__(self, allowance: KeyQuota) -> None:
        self._allowance = allowance
        self._spent = 0

    async def spend_images(self, count: int) -> None:
        """Take images off."""
        self._allowance.spend_images(count)
        self._spent += count

    def end(self, *, drew: bool) -> None:
        """Give back what came to nothing."""
        self._allowance.end()
        if not drew:
            self._allowance.return_images(self._spent)


def _part(limit: int, share: float) -> int:
    # A hair more, so that rounding leaves a third of three at one.
    return max(1, math.floor(limit * share + 1e-9))
