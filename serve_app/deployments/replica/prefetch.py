"""Loading the adapters that are most in use into a new replica, before it takes requests.

Must not know Ray, or who counts the uses: the question is handed in.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from serve_app.core import AdapterSpec
from serve_app.errors import LoraplexError
from serve_app.settings import ReplicaSettings

log = logging.getLogger(__name__)


async def prefetch_adapters(
    popular: Callable[[], Awaitable[Sequence[AdapterSpec]]],
    load: Callable[[AdapterSpec], Awaitable[None]],
    settings: ReplicaSettings,
) -> int:
    """Load the most used adapters and return how many; those that fail or take too long are left out.

    A start never fails because of it.
    """
    if settings.warm_up_timeout_s == 0:
        return 0
    loaded = 0
    try:
        async with asyncio.timeout(settings.warm_up_timeout_s):
            # One after the other, so that the most used are complete when time is out.
            for spec in fitting(await popular(), settings):
                loaded += await _load(load, spec)
    except TimeoutError:
        log.info("the warm-up was cut off after %g s", settings.warm_up_timeout_s)
    except Exception:
        log.warning("the warm-up failed; adapters are fetched when they are asked for", exc_info=True)
    log.info("%d adapters were loaded before the first request", loaded)
    return loaded


def fitting(specs: Sequence[AdapterSpec], settings: ReplicaSettings) -> list[AdapterSpec]:
    """Return what a replica's settings allow of these, in their order: never more than it could hold."""
    left_bytes = min(settings.warm_up_size, settings.host_cache)
    chosen: list[AdapterSpec] = []
    for spec in specs[: settings.max_warm_up_adapters]:
        if spec.size_bytes <= left_bytes:
            left_bytes -= spec.size_bytes
            chosen.append(spec)
    return chosen


async def _load(load: Callable[[AdapterSpec], Awaitable[None]], spec: AdapterSpec) -> bool:
    try:
        await load(spec)
    except LoraplexError as error:
        log.info("%s was not loaded: %s", spec.key, error)
        return False
    return True
