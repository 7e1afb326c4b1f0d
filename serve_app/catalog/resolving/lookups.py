"""A single-flight cache: one running look-up per key, with its values and its failures kept for a while.

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
# Anybody can ask for names that do not exist.
MAX_FAILURES = 1000
GRACE_S = 0.5


@dataclass(frozen=True, slots=True)
class CachePolicy(Generic[V]):
    """How long outcomes are kept.

    `ttl_s_of` gives the lifetime of a value, counted from the start of its look-up. `failure_ttl_s` is the lifetime of
    a failure; a longer Retry-After of the Hub replaces it. With `grace_s`, an expired value is refreshed on the next
    request, which waits at most `grace_s` and then uses the old value; the old value also stays if the refresh fails
    with HubUnavailable. With `grace_s` None, an expired value is never used.
    """

    ttl_s_of: Callable[[V], float]
    failure_ttl_s: float
    grace_s: float | None = GRACE_S
    max_entries: int = MAX_ENTRIES


@dataclass(frozen=True, slots=True)
class _Value(Generic[V]):
    value: V
    expires_at: float


@dataclass(frozen=True, slots=True)
class _Failure:
    error: LoraplexError
    expires_at: float


class SingleFlightCache(Generic[K, V]):
    """Caches the outcome of a look-up for each key.

    Invariants: at most one look-up per key runs at a time, and it continues if its callers are cancelled. Failures are
    kept apart from values, so that look-ups that fail evict no value.
    """

    def __init__(self, policy: CachePolicy[V], *, clock: Callable[[], float]) -> None:
        self._policy = policy
        self._clock = clock
        self._values: OrderedDict[K, _Value[V]] = OrderedDict()
        self._failures: OrderedDict[K, _Failure] = OrderedDict()
        self._tasks: dict[K, asyncio.Task[_Value[V] | _Failure]] = {}

    async def get(self, key: K, look_up: Callable[[], Awaitable[V]]) -> V:
        """Return the value of a key; `look_up` is called if none is cached.

        Raises:
            LoraplexError: raised by the look-up, now or within the time that failures are kept.
        """
        found = self._find(key)
        if found is None or self._clock() >= found.expires_at:
            found = await self._outcome(key, look_up, found)
        if isinstance(found, _Value):
            return found.value
        # A copy, because an exception that is raised many times would collect tracebacks.
        error = copy.copy(found.error)
        if isinstance(error, HubUnavailable):
            # The cache answers with this failure until it expires.
            error.retry_after_s = max(1, math.ceil(found.expires_at - self._clock()))
        raise error

    async def refresh(self, key: K, look_up: Callable[[], Awaitable[V]]) -> None:
        """Look a key up even if it is cached.

        Raises:
            LoraplexError: raised by the look-up.
        """
        outcome = await asyncio.shield(self._task(key, look_up))
        if isinstance(outcome, _Failure):
            raise copy.copy(outcome.error)

    def knows(self, key: K) -> bool:
        """Whether `get` would answer without a look-up of something new."""
        failure = self._failures.get(key)
        is_refused = failure is not None and self._clock() < failure.expires_at
        return is_refused or key in self._values or key in self._tasks

    def values(self) -> Iterator[V]:
        """Yield every cached value, expired ones included."""
        return (entry.value for entry in list(self._values.values()))

    def _find(self, key: K) -> _Value[V] | _Failure | None:
        if key in self._values:
            self._values.move_to_end(key)
            return self._values[key]
        return self._failures.get(key)

    async def _outcome(
        self, key: K, look_up: Callable[[], Awaitable[V]], old: _Value[V] | _Failure | None
    ) -> _Value[V] | _Failure:
        grace_s = self._policy.grace_s
        is_started = key not in self._tasks
        task = self._task(key, look_up)
        if not isinstance(old, _Value) or grace_s is None:
            return await asyncio.shield(task)
        # Only the request that starts a refresh waits for it.
        await asyncio.wait({task}, timeout=grace_s if is_started else 0.0)
        return task.result() if task.done() else old

    def _task(self, key: K, look_up: Callable[[], Awaitable[V]]) -> asyncio.Task[_Value[V] | _Failure]:
        task = self._tasks.get(key)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._refresh(key, look_up))
            self._tasks[key] = task
            task.add_done_callback(lambda done: self._on_done(key, done))
        return task

    def _on_done(self, key: K, task: asyncio.Task[_Value[V] | _Failure]) -> None:
        self._tasks.pop(key, None)
        # Retrieved here, because every caller may have been cancelled.
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a look-up failed on our side", exc_info=error)

    async def _refresh(self, key: K, look_up: Callable[[], Awaitable[V]]) -> _Value[V] | _Failure:
        began = self._clock()
        try:
            value = await look_up()
            outcome = _Value(value, began + self._policy.ttl_s_of(value))
        except LoraplexError as error:
            outcome = self._after_failure(key, error)
        self._values.pop(key, None)
        self._failures.pop(key, None)
        if isinstance(outcome, _Value):
            self._values[key] = outcome
            while len(self._values) > self._policy.max_entries:
                self._values.popitem(last=False)
        else:
            self._failures[key] = outcome
            self._drop_failures()
        return outcome

    def _drop_failures(self) -> None:
        now, most = self._clock(), min(self._policy.max_entries, MAX_FAILURES)
        while len(self._failures) > most or next(iter(self._failures.values())).expires_at < now:
            self._failures.popitem(last=False)

    def _after_failure(self, key: K, error: LoraplexError) -> _Value[V] | _Failure:
        asked_s = error.retry_after_s if isinstance(error, HubRetryAfter) else 0.0
        expires_at = self._clock() + max(self._policy.failure_ttl_s, asked_s)
        old = self._values.get(key)
        if old is not None and self._policy.grace_s is not None and isinstance(error, HubUnavailable):
            log.warning("the last known answer stays in use: %s", error.reason)
            return _Value(old.value, expires_at)
        return _Failure(strip_traceback(error), expires_at)
