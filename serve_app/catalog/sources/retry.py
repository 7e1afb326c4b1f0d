"""Retries and rate limits of the Hub.

Owns the delays between tries, and the cooldown after a rate limit. Pure except for its own state: time and chance are
passed in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from serve_app.catalog.sources.hub_errors import HubRetryAfter, NonRetryableHubError
from serve_app.errors import HubUnavailable, LoraplexError


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Exponential backoff: the number of tries, and the first and longest delay.

    Each delay is random between half of its length and the whole, so that replicas that failed together do not retry
    together.
    """

    tries: int = 3
    first_s: float = 0.2
    longest_s: float = 3.0

    def next_delay_s(
        self, error: LoraplexError, *, tries_made: int, left_s: float, chance: Callable[[], float]
    ) -> float | None:
        """Return the seconds before the next try, or None if there should be none.

        None is returned for errors that a retry cannot change, after the last try, and if the delay is longer than the
        time that is left. A delay that the Hub asked for is never shortened.
        """
        if not isinstance(error, HubUnavailable) or isinstance(error, NonRetryableHubError) or tries_made >= self.tries:
            return None
        grown_s = min(self.longest_s, self.first_s * 2 ** (tries_made - 1))
        pause_s = grown_s * (0.5 + 0.5 * chance())
        if isinstance(error, HubRetryAfter):
            if error.retry_after_s > self.longest_s:
                return None
            # Never sooner than the Hub asked for, and not all replicas at the same moment.
            pause_s = error.retry_after_s + pause_s
        return pause_s if pause_s < left_s else None


class RateLimitCooldown:
    """The time until the Hub's rate limit ends, for all requests."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock` returns monotonic seconds."""
        self._clock = clock
        self._until = -math.inf

    def check(self, model: str) -> None:
        """Refuse a call while the rate limit holds.

        Raises:
            HubRetryAfter: with the seconds that are left.
        """
        left_s = self._until - self._clock()
        if left_s > 0:
            raise HubRetryAfter(model, "the Hub is limiting requests", math.ceil(left_s), is_limiting=True)

    def note(self, error: LoraplexError) -> None:
        """Record a rate limit."""
        if isinstance(error, HubRetryAfter) and error.is_limiting:
            self._until = max(self._until, self._clock() + error.retry_after_s)
