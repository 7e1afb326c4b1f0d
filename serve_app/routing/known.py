"""The routers of this process, by base, for the gateway that cuts requests in parts.

Owns the way between the gateway's event loop and those on which Serve runs its routers. It is apart from `router`,
since Serve carries a copy of that to each process, which has globals of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol
from weakref import ReferenceType, ref

from serve_app.routing.cost import ReplicaView


class KnowsReplicas(Protocol):
    """A router."""

    @property
    def num_replicas(self) -> int:
        """How many replicas run; from any thread."""
        ...

    async def views(self) -> list[ReplicaView]:
        """Return what is known of every replica at this moment."""
        ...


@dataclass(frozen=True, slots=True)
class _Running:
    router: ReferenceType[KnowsReplicas]
    loop: asyncio.AbstractEventLoop


_RUNNING: dict[str, _Running] = {}
_ON_JOINED: dict[str, tuple[asyncio.AbstractEventLoop, Callable[[], object]]] = {}


def announce(base_id: str, router: KnowsReplicas) -> None:
    """Note the router of a base; to be called on its event loop."""
    _RUNNING[base_id] = _Running(ref(router), asyncio.get_running_loop())


def on_joined(base_id: str, act: Callable[[], object]) -> None:
    """Have `act` called, on the event loop of now, when a replica of a base joins others."""
    _ON_JOINED[base_id] = (asyncio.get_running_loop(), act)


def joined(base_id: str) -> None:
    """Tell that a replica of a base has joined others; from any thread."""
    if base_id in _ON_JOINED:
        loop, act = _ON_JOINED[base_id]
        loop.call_soon_threadsafe(act)


def replicas_known(base_id: str) -> int:
    """Return how many replicas of a base this process's router knows; none before its first request, or without it."""
    running = _RUNNING.get(base_id)
    router = None if running is None else running.router()
    return 0 if router is None else router.num_replicas


async def known_replicas(base_id: str) -> list[ReplicaView]:
    """Return what this process's router knows of a base's replicas; nothing before its first request, or without it."""
    running = _RUNNING.get(base_id)
    router = None if running is None else running.router()
    if running is None or router is None:
        return []
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(router.views(), running.loop))
