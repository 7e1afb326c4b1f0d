"""How much a key may ask for: requests in a second, requests at once, images in a minute.

Owns the counting, exact within one process; each ingress replica counts for itself. Must not know HTTP or keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from serve_app.config import KeyLimits
from serve_app.errors import KeyLimitReached, OutOfBounds


class TokenBucket:
    """Fills by `rate_s` a second up to `capacity`; starts full."""

    def __init__(self, rate_s: float, capacity: float, *, clock: Callable[[], float]) -> None:
        self._rate_s = rate_s
        self._capacity = capacity
        self._clock = clock
        self._level = capacity
        self._filled_at = clock()

    def wait_s(self, count: float) -> float:
        """Return in how many seconds `count` can be taken, 0 where they can be now."""
        now = self._clock()
        self._level = min(self._capacity, self._level + (now - self._filled_at) * self._rate_s)
        self._filled_at = now
        # A hair less: whoever waits as long as was said must not be turned away by rounding.
        return max(0.0, count - 1e-9 - self._level) / self._rate_s

    def take(self, count: float) -> None:
        """Take so many; negative gives back."""
        self._level = min(self._capacity, self._level - count)


class KeyAllowance:
    """What one key may still do. Times are promises: whoever waits as long as `retry_after_s` says and is alone with
    its key is let in, but for a limit of concurrency, where nobody knows."""

    def __init__(self, key: str, limits: KeyLimits, *, clock: Callable[[], float]) -> None:
        self._key = key
        self._limits = limits
        self._running = 0
        rate_s, images = limits.requests_per_s, limits.images_per_minute
        burst = limits.burst or max(1, math.ceil(rate_s or 1))
        self._requests = None if rate_s is None else TokenBucket(rate_s, burst, clock=clock)
        self._images = None if images is None else TokenBucket(images / 60, images, clock=clock)

    def begin(self) -> None:
        """Let a request in; `end` must follow.

        Raises:
            KeyLimitReached: it came too soon, or too many are under way.
        """
        limits = self._limits
        if limits.concurrency is not None and self._running >= limits.concurrency:
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
