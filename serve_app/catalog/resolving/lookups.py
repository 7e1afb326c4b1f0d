"""Look-ups that are shared and remembered: one at a time per key, kept for a while, failures too.

Knows nothing of adapters: keys in, values or the product's errors out.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import math
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from serve_app.catalog.sources.hub_errors import HubRetryAfter
from serve_app.errors import HubUnavailable, LoraplexError, strip_traceback

log = logging.getLogger(__name__)

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

MAX_ENTRIES = 10_000
# Anybody can ask for names that nobody has; what is said of them is kept apart, so that it drives out no answer.
MAX_FAILURES = 1000
GRACE_S = 0.5


@dataclass(frozen=True, slots=True)
class _Cached(Generic[V]):
    value: V
    expires_at: float


@dataclass(frozen=True, slots=True)
class _Failed:
    error: LoraplexError
    expires_at: float


class SingleFlightCache(Generic[K, V]):
    """Remembers what `look_up` said about each key.

    At most one look-up per key runs at a time, and it outlives askers who leave. A value that has grown old
    is renewed on demand: an asker waits for that at most `grace_s` from its start and then takes the old
    value, which also stays where the renewal fails with HubUnavailable. Any other failure replaces it. Failures have a
    place of their own, smaller than that of values, and leave it when their time is over.
    """

    def __init__(
        self,
        look_up: Callable[[K], Awaitable[V]],
        *,
        ttl_s_of: Callable[[V], float],
        failure_ttl_s: float,
        clock: Callable[[], float],
        grace_s: float = GRACE_S,
        max_entries: int = MAX_ENTRIES,
    ) -> None:
        self._look_up = look_up
        self._ttl_s_of = ttl_s_of
        self._failure_ttl_s = failure_ttl_s
        self._clock = clock
        self._grace_s = grace_s
        self._max_entries = max_entries
        self._entries: OrderedDict[K, _Cached[V]] = OrderedDict()
        self._failures: OrderedDict[K, _Failed] = OrderedDict()
        self._flights: dict[K, asyncio.Task[_Cached[V] | _Failed]] = {}

    async def get(self, key: K) -> V:
        """Return the value of a key.

        Raises:
            LoraplexError: whatever the look-up raised, now or within the time that failures are kept.
        """
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(key)
            if self._clock() < entry.expires_at:
                return entry.value
            return self._outcome(await self._renewed(key, entry))
        failure = self._failures.get(key)
        if failure is not None and self._clock() < failure.expires_at:
            return self._outcome(failure)
        return self._outcome(await asyncio.shield(self._task(key)))

    def knows(self, key: K) -> bool:
        """Whether `get` would answer without a look-up of something new."""
        failure = self._failures.get(key)
        is_refused = failure is not None and self._clock() < failure.expires_at
        return is_refused or key in self._entries or key in self._flights

    def values(self) -> Iterator[V]:
        """Yield every value that is remembered, old ones included."""
        return (entry.value for entry in list(self._entries.values()))

    async def _renewed(self, key: K, old: _Cached[V]) -> _Cached[V] | _Failed:
        patience_s = 0.0 if key in self._flights else self._grace_s
        flight = self._task(key)
        await asyncio.wait({flight}, timeout=patience_s)
        return flight.result() if flight.done() else old

    def _task(self, key: K) -> asyncio.Task[_Cached[V] | _Failed]:
        flight = self._flights.get(key)
        if flight is None:
            flight = asyncio.get_running_loop().create_task(self._refresh(key))
            self._flights[key] = flight
            flight.add_done_callback(lambda done: self._on_done(key, done))
        return flight

    def _on_done(self, key: K, flight: asyncio.Task[_Cached[V] | _Failed]) -> None:
        self._flights.pop(key, None)
        if not flight.cancelled() and (fault := flight.exception()) is not None:
            # Retrieved here, for there may be nobody left who asked.
            log.error("a look-up failed on our side", exc_info=fault)

    async def _refresh(self, key: K) -> _Cached[V] | _Failed:
        entry: _Cached[V] | _Failed
        try:
            value = await self._look_up(key)
            entry = _Cached(value, self._clock() + self._ttl_s_of(value))
        except LoraplexError as error:
            entry = self._after_failure(key, error)
        self._entries.pop(key, None)
        self._failures.pop(key, None)
        if isinstance(entry, _Cached):
            self._entries[key] = entry
            while len(self._entries) > self._max_entries:
                self._entries.popitem(last=False)
        else:
            self._keep_failure(key, entry)
        return entry

    def _keep_failure(self, key: K, failure: _Failed) -> None:
        now = self._clock()
        self._failures[key] = failure
        while len(self._failures) > MAX_FAILURES or next(iter(self._failures.values())).expires_at < now:
            self._failures.popitem(last=False)

    def _after_failure(self, key: K, error: LoraplexError) -> _Cached[V] | _Failed:
        # The Hub's own word counts where it asked for more time than failures are kept for.
        kept_s = (
            max(self._failure_ttl_s, error.retry_after_s) if isinstance(error, HubRetryAfter) else self._failure_ttl_s
        )
        expires_at = self._clock() + kept_s
        old = self._entries.get(key)
        if old is not None and isinstance(error, HubUnavailable):
            log.warning("what was known before is served on: %s", error.reason)
            return _Cached(old.value, expires_at)
        return _Failed(strip_traceback(error), expires_at)

    def _outcome(self, entry: _Cached[V] | _Failed) -> V:
        if isinstance(entry, _Cached):
            return entry.value
        # A copy: an exception that is raised again and again would gather tracebacks.
        error = copy.copy(entry.error)
        if isinstance(error, HubUnavailable):
            # Sooner than that, nobody would be asked.
            error.retry_after_s = max(1, math.ceil(entry.expires_at - self._clock()))
        raise error
