"""The other replicas of the same deployment, as a replica that starts sees them.

Owns the way to them through Serve.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

from ray import serve

from serve_app.deployments.warming import Wanted

# Serve types its states as an enumeration, and sends them as text.
RUNNING: Any = "RUNNING"


async def ask_siblings() -> Iterable[Iterable[Wanted]]:
    """Return what each running replica of this deployment was asked for; none where this is the first."""
    here = serve.get_replica_context()
    if not await asyncio.to_thread(_any_running, here.app_name, here.deployment):
        # A call to a deployment without replicas would wait for this very one.
        return ()
    handle = serve.get_deployment_handle(here.deployment, here.app_name)
    answers = await handle.broadcast("demand").results_async(return_exceptions=True)
    return [answer for answer in answers if not isinstance(answer, Exception)]


def _any_running(app_name: str, deployment: str) -> bool:
    application = serve.status().applications.get(app_name)
    overview = application.deployments.get(deployment) if application else None
    return overview is not None and overview.replica_states.get(RUNNING, 0) > 0
