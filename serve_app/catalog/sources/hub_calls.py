"""Questions to the Hub: away from the event loop, within their time, and asked again where that may help.

Owns the way of a question from its asker to an answer or to one of the product's errors. Must not know what is asked.
"""

from __future__ import annotations

import itertools
import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from serve_app.catalog.reading.blocking import run_blocking
from serve_app.catalog.sources.hub_errors import HUB_FAILURES, translate
from serve_app.catalog.sources.retry import RateLimitCooldown, RetryPolicy
from serve_app.errors import HubUnavailable, LoraplexError

log = logging.getLogger(__name__)

T = TypeVar("T")

LOOK_UP = RetryPolicy(tries=3)
# A download counts its tries from the last one that brought bytes.
DOWNLOAD = RetryPolicy(tries=4)


class HubCalls:
    """The questions asked with one token; all of them keep the rest that the Hub asked for."""

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        chance: Callable[[], float] = random.random,
    ) -> None:
        """`clock` gives seconds that only grow, `chance` a number from 0 to 1."""
        self.clock = clock
        self._sleep = sleep
        self._chance = chance
        self._cooldown = RateLimitCooldown(clock)

    async def ask(self, call: Callable[[], T], model: str, revision: str | None, timeout_s: float) -> T:
        """Return what a blocking call returns, asked again where it fails for now.

        Raises:
            LoraplexError: what the call's failure means for the model.
        """
        until = self.clock() + timeout_s
        return await self.run(lambda: self.persist(call, model, revision, until, LOOK_UP), model, revision, timeout_s)

    async def run(self, call: Callable[[], T], model: str, revision: str | None, timeout_s: float) -> T:
        """Return what a blocking call returns that persists by itself.

        Raises:
            LoraplexError: as for `ask`.
        """
        try:
            return await run_blocking(call, timeout_s=timeout_s)
        except TimeoutError:
            raise HubUnavailable(model, f"the Hub took longer than {timeout_s:g} s") from None
        except LoraplexError:
            raise
        except HUB_FAILURES as error:
            raise self._meaning(error, model, revision) from None

    def persist(
        self,
        call: Callable[[], T],
        model: str,
        revision: str | None,
        until: float,
        pauses: RetryPolicy,
        headway: Callable[[], int] = lambda: 0,
    ) -> T:
        """Return what `call` returns, tried as `pauses` says and never after `until`; blocks.

        `headway` tells how far it came: tries count from the last one that came farther.

        Raises:
            LoraplexError: what the last failure means.
            TimeoutError: the call said so.
        """
        reached, tried_before = headway(), 0
        for tries in itertools.count(1):
            self._cooldown.check(model)
            try:
                return call()
            except TimeoutError:
                raise
            except (LoraplexError, *HUB_FAILURES) as error:
                refusal = self._meaning(error, model, revision)
            self._cooldown.note(refusal)
            if (came := headway()) > reached:
                reached, tried_before = came, tries - 1
            pause_s = pauses.next_delay_s(
                refusal, tries_made=tries - tried_before, left_s=until - self.clock(), chance=self._chance
            )
            if pause_s is None:
                raise refusal
            log.info("the Hub is asked about %s again in %.1f s: %s", model, pause_s, refusal)
            self._sleep(pause_s)
        raise AssertionError("the loop above ends by itself")

    def _meaning(self, error: Exception, model: str, revision: str | None) -> LoraplexError:
        if not isinstance(error, LoraplexError):
            log.info("the Hub failed for %s: %s", model, type(error).__name__)
        return translate(error, model, revision)
