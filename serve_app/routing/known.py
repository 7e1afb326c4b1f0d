"""The routers of this process, by base, for the gateway that cuts requests in parts.

Owns the way from the gateway's event loop to those on which Serve runs its routers. Apart from `router`, the copy of
which that Serve carries to each process has globals of its own.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Protocol
from weakref import ReferenceType, ref

from serve_app.routing.cost import ReplicaView


class KnowsReplicas(Protocol):
    """A router."""

    async def views(self) -> list[ReplicaView]:
        """Return what is known of every replica at this moment."""
        ...


@dataclass(frozen=True, slots=True)
class _Running:
    router: ReferenceType[KnowsReplicas]
    loop: asyncio.AbstractEventLoop


_RUNNING: dict[str, _Running] = {}


def announce(base_id: str, router: KnowsReplicas) -> None:
    """Note the router of a base; to be called on its event loop."""
    _RUNNING[base_id] = _Running(ref(router), asyncio.get_running_loop())


async def known_replicas(base_id: str) -> list[ReplicaView]:
    """Return what this process's router knows of a base's replicas; nothing before its first request, or without it."""
    running = _RUNNING.get(base_id)
    router = None if running is None else running.router()
    if running is None or router is None:
        return []
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(router.views(), running.loop))
