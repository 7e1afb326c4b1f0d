"""Calls to the Hub or to an object store: in a thread, with a timeout, and with retries.

Owns the threads, timeouts and retries. Must not know what is called.
"""

from __future__ import annotations

import itertools
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from serve_app.catalog.reading.blocking import run_blocking
from serve_app.catalog.sources.hub_errors import HUB_FAILURES, translate
from serve_app.catalog.sources.retry import RateLimitCooldown, RetryPolicy
from serve_app.errors import HubUnavailable, LoraplexError

log = logging.getLogger(__name__)

T = TypeVar("T")

LOOK_UP = RetryPolicy(tries=3)
# A download counts its tries from the last one that received bytes.
DOWNLOAD = RetryPolicy(tries=4)


@dataclass(frozen=True, slots=True)
class Remote:
    """A remote service: its name in messages, the exceptions that it can raise, and what they mean to a caller.

    `translate` takes an exception, the model and the revision.
    """

    name: str
    failures: tuple[type[Exception], ...]
    translate: Callable[[Exception, str, str | None], LoraplexError]
    unavailable: type[HubUnavailable]


THE_HUB = Remote("the Hub", HUB_FAILURES, translate, HubUnavailable)


class RemoteCalls:
    """The calls of one source; all of them respect the remote's rate limit."""

    def __init__(
        self,
        remote: Remote = THE_HUB,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        chance: Callable[[], float] = random.random,
    ) -> None:
        """`clock` returns monotonic seconds, `chance` a number from 0 to 1."""
        self._remote = remote
        self.clock = clock
        self._sleep = sleep
        self._chance = chance
        self._cooldown = RateLimitCooldown(clock)

    async def call_with_retries(self, call: Callable[[], T], model: str, revision: str | None, timeout_s: float) -> T:
        """Return the result of a blocking call, retried after temporary failures.

        Raises:
            LoraplexError: the last failure, translated.
        """
        until = self.clock() + timeout_s
        return await self.run_with_timeout(
            lambda: self.retry(call, model, revision, until, LOOK_UP), model, revision, timeout_s
        )

    async def run_with_timeout(self, call: Callable[[], T], model: str, revision: str | None, timeout_s: float) -> T:
        """Return the result of a blocking call that retries by itself.

        Raises:
            LoraplexError: as for `call_with_retries`.
        """
        try:
            return await run_blocking(call, timeout_s=timeout_s)
        except TimeoutError:
            raise self._remote.unavailable(model, f"{self._remote.name} took longer than {timeout_s:g} s") from None
        except LoraplexError:
            raise
        except self._remote.failures as error:
            raise self._translate(error, model, revision) from None

    def retry(
        self,
        call: Callable[[], T],
        model: str,
        revision: str | None,
        until: float,
        policy: RetryPolicy,
        progress: Callable[[], int] = lambda: 0,
    ) -> T:
        """Return the result of `call`, retried by a policy and never after `until`; blocks.

        Tries count from the last one after which `progress` had grown.

        Raises:
            LoraplexError: the last failure, translated.
            TimeoutError: raised by the call.
        """
        reached, tried_before = progress(), 0
        for tries in itertools.count(1):
            self._cooldown.check(model)
            try:
                return call()
            except TimeoutError:
                raise
            except (LoraplexError, *self._remote.failures) as error:
                failure = self._translate(error, model, revision)
            self._cooldown.note(failure)
            if (came := progress()) > reached:
                reached, tried_before = came, tries - 1
            delay_s = policy.next_delay_s(
                failure, tries_made=tries - tried_before, left_s=until - self.clock(), chance=self._chance
            )
            if delay_s is None:
                raise failure
            log.info("%s is called again for %s in %.1f s: %s", self._remote.name, model, delay_s, failure)
            self._sleep(delay_s)
        raise AssertionError("the loop above ends by itself")

    def _translate(self, error: Exception, model: str, revision: str | None) -> LoraplexError:
        if not isinstance(error, LoraplexError):
            log.info("%s failed for %s: %s", self._remote.name, model, type(error).__name__)
        return self._remote.translate(error, model, revision)
