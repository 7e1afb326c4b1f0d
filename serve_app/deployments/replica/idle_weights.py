"""The weights of bases without a replica, kept in host memory, so that the next start copies what others would read.

    replica, once its base is loaded -> an actor of its node maps the base's files and locks their pages
    the actor, now and then          -> Serve: is the application still there? lets go of what is not, and ends at last

Owns the actor, of which a node has one for each service. Its pages are those that replicas map, so that it takes memory
only while none runs. Must not know how a base is loaded.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import mmap
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray import serve
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from serve_app.catalog.reading.blocking import run_blocking
from serve_app.config import SharedSettings
from serve_app.deployments.shared.logs import set_up_logging

log = logging.getLogger(__name__)

NAMESPACE = "loraplex"
CHECK_S = 20.0


@dataclass(frozen=True, slots=True)
class HeldFile:
    """A file whose pages stay in memory for as long as this is; `is_locked` where the system promises that."""

    pages: NDArray[np.uint8]
    is_locked: bool


def hold_file(path: Path) -> HeldFile:
    """Bring a file into memory and lock it there, where the limit of locked memory allows.

    Raises:
        OSError: the file cannot be mapped.
    """
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    mapped.madvise(mmap.MADV_WILLNEED)
    pages = np.frombuffer(mapped, np.uint8)  # keeps the mapping
    # Brings the pages in and waits for them; a mapping that goes takes its lock with it.
    is_locked = ctypes.CDLL(None).mlock(ctypes.c_void_p(pages.ctypes.data), ctypes.c_size_t(pages.nbytes)) == 0
    return HeldFile(pages, is_locked)


class HeldBases:
    """The files of bases, up to a budget; those of the base that was loaded longest ago are let go of first."""

    def __init__(self) -> None:
        self._held: OrderedDict[str, tuple[str, list[HeldFile]]] = OrderedDict()

    @property
    def bases(self) -> tuple[str, ...]:
        """The bases that are held, the newest last."""
        return tuple(self._held)

    @property
    def size_bytes(self) -> int:
        """The sizes of all files."""
        return sum(one.pages.nbytes for _, files in self._held.values() for one in files)

    def hold(self, base: str, application: str, files: Sequence[Path], budget_bytes: int) -> None:
        """Keep the files of a base in memory in place of what is held of it, but none that is over the budget alone."""
        self._held.pop(base, None)
        wanted_bytes = sum(path.stat().st_size for path in files)
        if wanted_bytes > budget_bytes:
            log.warning("%s is not kept in memory: %d bytes, of %d that may be", base, wanted_bytes, budget_bytes)
            return
        while self.size_bytes + wanted_bytes > budget_bytes:
            gone, _ = self._held.popitem(last=False)
            log.info("%s is kept in memory no more: %s takes its place", gone, base)
        held = [hold_file(path) for path in files]
        self._held[base] = application, held
        locked = "locked" if all(one.is_locked for one in held) else "not locked: the limit of locked memory is too low"
        log.info("%s is kept in memory: %d bytes, %s", base, wanted_bytes, locked)

    def keep_only(self, applications: Collection[str]) -> bool:
        """Let go of bases of other applications; return whether any is left."""
        for base in [base for base, (application, _) in self._held.items() if application not in applications]:
            del self._held[base]
            log.info("%s is kept in memory no more: its application is gone", base)
        return bool(self._held)


def _deployed() -> Collection[str]:
    return serve.status().applications.keys()


class IdleWeights:
    """The actor."""

    def __init__(
        self, log_level: str, *, deployed: Callable[[], Collection[str]] = _deployed, check_s: float = CHECK_S
    ) -> None:
        set_up_logging(log_level)
        self._bases, self._deployed, self._check_s = HeldBases(), deployed, check_s
        self._watching: asyncio.Task[None] | None = None

    async def hold(self, base: str, application: str, files: Sequence[Path], budget_bytes: int) -> None:
        """Keep the files of a base in memory for as long as its application is deployed."""
        try:
            await run_blocking(lambda: self._bases.hold(base, application, files, budget_bytes))
        except OSError as error:
            log.warning("%s is not kept in memory: %s", base, error.strerror)
        if self._watching is None:
            self._watching = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        is_needed = True
        while is_needed:
            await asyncio.sleep(self._check_s)
            with contextlib.suppress(RayError, TimeoutError):  # Serve's controller is away: it knows again later
                is_needed = self._bases.keep_only(await run_blocking(self._deployed))
        ray.kill(ray.get_runtime_context().current_actor)


def keep_in_memory(shared: SharedSettings, base: str, files: Sequence[Path]) -> None:
    """Have the node of this replica keep its base's files in memory from now on, without waiting for it."""
    node = ray.get_runtime_context().get_node_id()
    application = serve.get_replica_context().app_name
    kept: Any = ray.remote(IdleWeights)
    actor = kept.options(
        name=actor_name(shared.service, node),
        namespace=NAMESPACE,
        get_if_exists=True,
        lifetime="detached",
        num_cpus=0,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
    ).remote(shared.log_level)
    actor.hold.remote(base, application, files, shared.base_files.idle_memory)


def actor_name(service: str, node: str) -> str:
    """Return the name of a node's actor."""
    return f"loraplex-idle-weights-{service}-{node}"
