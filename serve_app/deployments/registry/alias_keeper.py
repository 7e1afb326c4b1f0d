"""The one keeper of all aliases, which every ingress replica follows.

Owns the single-replica deployment around the store. It runs on the head node, where its file lies.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from pathlib import Path
from typing import Any

from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from serve_app.catalog.resolving.aliases import Alias, AliasStore, AliasTable, TableVersion
from serve_app.config import Environment
from serve_app.deployments.shared.logs import set_up_logging
from serve_app.deployments.shared.sharing import NODE
from serve_app.errors import LoraplexError, NotReady

log = logging.getLogger(__name__)

FILE_NAME = "registry.sqlite3"

# How long a follower's question stays open; also what a rolling update of this deployment may have to wait.
HOLD_S = 2.0
# A change is asked for by a person, who should hear of a keeper that hangs.
CHANGE_TIMEOUT_S = 10.0


# Its callers ask without end, which would fill the access log.
@serve.deployment(logging_config={"enable_access_log": False})
class AliasKeeper:
    """Holds the store; tells each change to whoever follows, as it happens."""

    def __init__(self, path: Path | None, environment: Environment, log_level: str) -> None:
        """Open the file; `path` None means the usual name in the cache's folder."""
        set_up_logging(log_level)
        # Nodes get new ids when a cluster restarts; the head stays the head.
        folder = Path(str(environment.cache_dir).replace(NODE, "head"))
        self._store = AliasStore(path or folder / FILE_NAME, clock=time.time)
        self._changed = asyncio.Condition()
        self._table = self._store.table()
        log.info("the registry holds %d aliases at version %d", len(self._table.aliases), self._table.version.number)

    async def watch(self, known: TableVersion) -> AliasTable | None:
        """Return the aliases once they are others than at the version known; None where that takes too long."""
        async with self._changed:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait_for(lambda: self._table.version != known), HOLD_S)
        return self._table if self._table.version != known else None

    async def put(self, alias: Alias, *, may_replace: bool) -> AliasTable:
        """Keep an alias.

        Raises:
            NameTaken, OutOfBounds: as the store does.
        """
        table = await asyncio.to_thread(self._store.put, alias, may_replace=may_replace)
        return await self._told(table, f"{alias.name} stands for {alias.target.id}")

    async def remove(self, name: str) -> AliasTable:
        """Remove an alias, if it is there."""
        table = await asyncio.to_thread(self._store.remove, name)
        return await self._told(table, f"{name} is removed")

    async def _told(self, table: AliasTable, what: str) -> AliasTable:
        async with self._changed:
            # Two changes may come back from their threads in the other order.
            if table.version.number > self._table.version.number:
                self._table = table
                log.info("alias %s; version %d", what, table.version.number)
                self._changed.notify_all()
        return table


class AliasClient:
    """The way to the keeper from another process."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def watch(self, known: TableVersion) -> AliasTable | None:
        """Return the aliases once they are others than at the version known; None where that takes too long.

        Raises:
            NotReady: the keeper is away.
        """
        return await _answer(self._handle.watch.remote(known), HOLD_S + CHANGE_TIMEOUT_S)

    async def put(self, alias: Alias, *, may_replace: bool) -> AliasTable:
        """Keep an alias.

        Raises:
            NotReady: the keeper is away.
            NameTaken, OutOfBounds: as the store does.
        """
        return await _answer(self._handle.put.remote(alias, may_replace=may_replace), CHANGE_TIMEOUT_S)

    async def remove(self, name: str) -> AliasTable:
        """Remove an alias, if it is there.

        Raises:
            NotReady: the keeper is away.
        """
        return await _answer(self._handle.remove.remote(name), CHANGE_TIMEOUT_S)


# A response has other types with streams than without, which Ray's own types mix.
async def _answer(response: Any, timeout_s: float) -> Any:
    asking = asyncio.ensure_future(_awaited(response))
    try:
        await asyncio.wait({asking}, timeout=timeout_s)
        if asking.done():
            return asking.result()
        raise NotReady("the registry")
    finally:
        if not asking.done():
            response.cancel()
            asking.cancel()


async def _awaited(response: Any) -> Any:
    try:
        return await response
    except LoraplexError as error:
        # What arrives is Ray's double of our error, whose text is a remote traceback.
        raise getattr(error, "cause", error) from None
    except RayTaskError as error:
        raise error.cause from None
    except (RayActorError, RayServeException):
        raise NotReady("the registry") from None
