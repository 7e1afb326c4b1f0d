"""How long the start of a replica took, for the autoscaler and for callers who wait for the next one."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from serve_app.catalog.reading.blocking import run_blocking
from serve_app.deployments.registry.base_states import counted_start_s
from serve_app.deployments.registry.replica_counts import asked_for_at

log = logging.getLogger(__name__)

# No start is held up for longer by the question, or by telling the answer.
ANSWER_TIMEOUT_S = 1.0


async def counted_start(base_id: str, load_s: float, keeper: DeploymentHandle) -> float:
    """Return how long this replica's start took, `load_s` of it in its process, and have the keeper remember that."""
    context = serve.get_replica_context()
    asked_at: float | None = None
    try:
        asked_at = await run_blocking(
            lambda: asked_for_at(context.app_name, context.deployment, context.replica_id.unique_id),
            timeout_s=ANSWER_TIMEOUT_S,
        )
    except (RayError, RayServeException, TimeoutError) as error:
        log.info("Serve did not say when it asked for this replica: %s", type(error).__name__)
    start_s = counted_start_s(load_s, asked_at, now_s=time.time())
    told: Any = keeper.started.remote(base_id, start_s)
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            await told
    except (RayError, RayServeException, TimeoutError) as error:
        log.info("the keeper was not told how long this start took: %s", type(error).__name__)
    return start_s
