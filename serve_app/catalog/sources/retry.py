"""When to ask the Hub again after it failed, and when to leave it alone.

Owns the pauses between tries, and the rest that a Hub asked for. Pure but for its own books: time and chance are given.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from serve_app.catalog.sources.hub_errors import HubRetryAfter, NonRetryableHubError
from serve_app.errors import HubUnavailable, LoraplexError


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often a question is asked, and how long the pauses grow.

    Each pause is drawn between half of its length and the whole, so that replicas that failed together do not ask again
    together.
    """

    tries: int = 3
    first_s: float = 0.2
    longest_s: float = 3.0

    def next_delay_s(
        self, error: LoraplexError, *, tries_made: int, left_s: float, chance: Callable[[], float]
    ) -> float | None:
        """Return how long to wait before the next try, or None where there should be none.

        None is for answers that would be the same again, for the last try, and for a pause that the time that is left
        does not allow: one that the Hub asked for is kept, never shortened.
        """
        if not isinstance(error, HubUnavailable) or isinstance(error, NonRetryableHubError) or tries_made >= self.tries:
            return None
        grown_s = min(self.longest_s, self.first_s * 2 ** (tries_made - 1))
        pause_s = grown_s * (0.5 + 0.5 * chance())
        if isinstance(error, HubRetryAfter):
            if error.retry_after_s > self.longest_s:
                return None
            # Never sooner than it was told, and not all at the same moment either.
            pause_s = error.retry_after_s + pause_s
        return pause_s if pause_s < left_s else None


class RateLimitCooldown:
    """The time for which the Hub said that it answers no more questions, whichever they are."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock` gives seconds that only grow."""
        self._clock = clock
        self._until = -math.inf

    def check(self, model: str) -> None:
        """Refuse to ask while the Hub rests.

        Raises:
            HubRetryAfter: with the seconds that are left.
        """
        left_s = self._until - self._clock()
        if left_s > 0:
            raise HubRetryAfter(model, "the Hub is limiting requests", math.ceil(left_s), is_limiting=True)

    def note(self, error: LoraplexError) -> None:
        """Learn from an answer."""
        if isinstance(error, HubRetryAfter) and error.is_limiting:
            self._until = max(self._until, self._clock() + error.retry_after_s)
