"""Making a new replica ready for the adapters that are most in demand, before it takes requests.

Owns the demand that one replica has seen, and the warm-up of another from it. What is in demand is asked of the
replicas of the same base that run: they see the traffic, wherever they are, and nothing has to be kept on disk. Must
not know Ray: the question is handed in.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

from serve_app.core import AdapterSpec
from serve_app.errors import LoraplexError
from serve_app.settings import ReplicaSettings

log = logging.getLogger(__name__)

# A use counts half after this long: the traffic of this hour, not of yesterday.
HALF_LIFE_S = 900.0
# A replica that has seen thousands of adapters names no more than it could be asked to warm.
MAX_NAMED = 64
# A running replica answers in milliseconds; one that hangs must not keep another from starting.
ASK_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class PopularAdapter:
    """How much an adapter was used of late: `uses` fades."""

    spec: AdapterSpec
    uses: float


class UsageTracker:
    """What one replica was asked for of late."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._uses: dict[str, tuple[AdapterSpec, float, float]] = {}

    def note(self, spec: AdapterSpec) -> None:
        """Count one use."""
        now = self._clock()
        _, uses, at = self._uses.get(spec.key, (spec, 0.0, now))
        self._uses[spec.key] = spec, uses * _share_left(now - at) + 1, now
        if len(self._uses) > 4 * MAX_NAMED:
            self._uses = {each.spec.key: self._uses[each.spec.key] for each in self.most()}

    def most(self) -> tuple[PopularAdapter, ...]:
        """Return the adapters used most, first the one most used."""
        now = self._clock()
        wanted = [PopularAdapter(spec, uses * _share_left(now - at)) for spec, uses, at in self._uses.values()]
        return tuple(sorted(wanted, key=lambda each: -each.uses)[:MAX_NAMED])


def chosen(told: Iterable[Iterable[PopularAdapter]], *, max_adapters: int, max_bytes: int) -> tuple[AdapterSpec, ...]:
    """Return what to warm up: the most used over all replicas first, as many as fit."""
    uses: dict[str, float] = defaultdict(float)
    specs: dict[str, AdapterSpec] = {}
    for wanted in (each for replica in told for each in replica):
        uses[wanted.spec.key] += wanted.uses
        specs[wanted.spec.key] = wanted.spec
    picked: list[AdapterSpec] = []
    left_bytes = max_bytes
    for key in sorted(uses, key=lambda key: (-uses[key], key))[:max_adapters]:
        if specs[key].size_bytes <= left_bytes:
            left_bytes -= specs[key].size_bytes
            picked.append(specs[key])
    return tuple(picked)


@dataclass(frozen=True, slots=True)
class WarmUpLimits:
    """What a warm-up may take; `timeout_s` 0 is none at all. Asking the siblings may take `ask_timeout_s` of it."""

    timeout_s: float
    max_adapters: int
    max_bytes: int
    ask_timeout_s: float = ASK_TIMEOUT_S


def warm_up_limits(settings: ReplicaSettings) -> WarmUpLimits:
    """Return what a replica's settings allow: never more than it could hold."""
    return WarmUpLimits(
        timeout_s=settings.warm_up_timeout_s,
        max_adapters=settings.max_warm_up_adapters,
        max_bytes=min(settings.warm_up_size, settings.host_cache),
    )


async def prefetch_adapters(
    ask: Callable[[], Awaitable[Iterable[Iterable[PopularAdapter]]]],
    bring: Callable[[AdapterSpec], Awaitable[None]],
    limits: WarmUpLimits,
    *,
    clock: Callable[[], float],
) -> int:
    """Bring the adapters most in demand and return how many came; what fails or takes too long is left out.

    A start never fails for want of a warm-up.
    """
    if limits.timeout_s == 0:
        return 0
    began = clock()
    ready = 0
    try:
        async with asyncio.timeout(limits.timeout_s):
            async with asyncio.timeout(limits.ask_timeout_s):
                told = await ask()
            # One after the other, so that the most wanted are complete when time is out.
            for spec in chosen(told, max_adapters=limits.max_adapters, max_bytes=limits.max_bytes):
                ready += await _brought(bring, spec)
    except TimeoutError:
        log.info("the warm-up was cut off after %.1f s", clock() - began)
    except Exception:
        log.warning("the warm-up failed; adapters are fetched when they are asked for", exc_info=True)
    log.info("%d adapters were made ready in %.1f s before the first request", ready, clock() - began)
    return ready


async def _brought(bring: Callable[[AdapterSpec], Awaitable[None]], spec: AdapterSpec) -> bool:
    try:
        await bring(spec)
    except LoraplexError as error:
        log.info("%s was not made ready: %s", spec.key, error)
        return False
    return True


def _share_left(age_s: float) -> float:
    return math.exp2(-age_s / HALF_LIFE_S)
