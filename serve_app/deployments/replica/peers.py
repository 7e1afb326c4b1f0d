"""The other replicas of the same deployment, as a replica that starts sees them.

Owns the way to them through Serve.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from ray import serve

from serve_app.deployments.registry.fleet import ReplicaCount, replica_counts
from serve_app.deployments.replica.prefetch import PopularAdapter


async def collect_peer_usage() -> Iterable[Iterable[PopularAdapter]]:
    """Return what each running replica of this deployment was asked for; none where this is the first."""
    here = serve.get_replica_context()
    counts = await asyncio.to_thread(replica_counts, here.app_name)
    if not counts.get(here.deployment, ReplicaCount()).running:
        # A call to a deployment without replicas would wait for this very one.
        return ()
    handle = serve.get_deployment_handle(here.deployment, here.app_name)
    answers = await handle.broadcast("demand").results_async(return_exceptions=True)
    return [answer for answer in answers if not isinstance(answer, Exception)]
