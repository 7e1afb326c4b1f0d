"""Whether a replica's process has ended.

Owns what is used of Ray's state of actors, which it does not publish (`docs/routing.md` has the table): its public way
to it needs the dashboard, which `serve run` does without.
"""

from __future__ import annotations

import asyncio

import ray._private.state

LOOK_EVERY_S = 0.2
# Ray takes a process for dead within seconds of its connection's end.
PATIENCE_S = 10.0


async def has_ended(actor_id: str | None) -> bool:
    """Return whether the process of an unreachable actor has ended: once Ray knows, at most after 10 s."""
    for _ in range(round(PATIENCE_S / LOOK_EVERY_S)):
        if actor_id is None:
            return False
        if await asyncio.to_thread(_state_of, actor_id) == "DEAD":
            return True
        await asyncio.sleep(LOOK_EVERY_S)
    return False


def _state_of(actor_id: str) -> str:
    return str(ray._private.state.actors(actor_id).get("State"))
