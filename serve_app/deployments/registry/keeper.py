"""State shared by the processes of a service: aliases, what was drawn, how long starts took, which node has which
files, adapters in use.

Owns the single-replica deployment around them. It runs on the head node, where the files of the first three lie, unless
aliases are in Redis; the rest is in memory alone, and losing it costs a fetch for each file that is still wanted.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import ray
from ray import serve

from serve_app.catalog.replica_report import DayUsage
from serve_app.catalog.resolving.aliases import Alias, AliasStore, AliasTable, TableVersion
from serve_app.catalog.resolving.redis_aliases import RedisAliasStore
from serve_app.config import Environment, SharedSettings
from serve_app.core import AdapterSpec
from serve_app.deployments.registry.ledger import Ledger
from serve_app.deployments.registry.usage import UsageTracker
from serve_app.deployments.shared.file_index import DownloadCoordinator, HubSnapshot, OfferedBases, SharedFile
from serve_app.deployments.shared.logs import set_up_logging
from serve_app.deployments.shared.sharing import NODE
from serve_app.settings import RegistrySettings

log = logging.getLogger(__name__)

KEEPER_NAME = "Keeper"
FILE_NAME = "registry.sqlite3"
# Beside it.
LEDGER_NAME = "usage.sqlite3"

# How long a follower's question stays open; also what a rolling update of this deployment may have to wait.
HOLD_S = 2.0


# Its callers ask without end, which would fill the access log.
@serve.deployment(logging_config={"enable_access_log": False})
class Keeper:
    """The one keeper of a service, in the ingress' application.

    It tells each change of the aliases to those who follow, as it happens.
    """

    def __init__(self, shared: SharedSettings, registry: RegistrySettings, environment: Environment) -> None:
        """Read the aliases.

        Raises:
            NotReady: they are in Redis, which does not answer; Serve starts another keeper.
        """
        set_up_logging(shared.log_level)
        self._aliases = _alias_store(registry, environment)
        self._ledger = Ledger(_file_of(registry, environment).with_name(LEDGER_NAME), clock=time.time)
        self._changed = asyncio.Condition()
        self._table = self._aliases.table()
        sharing = shared.adapters.sharing
        self._files = DownloadCoordinator(
            patience_s=sharing.wait_timeout_s, budget_bytes=sharing.memory, clock=time.monotonic
        )
        self._bases = OfferedBases()
        self._usage: defaultdict[str, UsageTracker] = defaultdict(lambda: UsageTracker(time.monotonic))
        log.info("the registry holds %d aliases at version %d", len(self._table.aliases), self._table.version.number)

    async def watch(self, known: TableVersion, uses: Mapping[AdapterSpec, int]) -> AliasTable | None:
        """Return the aliases once they are others than at the version known; None where that takes too long.

        `uses` counts the requests for adapters since the caller asked last.
        """
        for spec, count in uses.items():
            self._usage[spec.base_id].note(spec, count)
        async with self._changed:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait_for(lambda: self._table.version != known), HOLD_S)
        return self._table if self._table.version != known else None

    async def put(self, alias: Alias, *, may_replace: bool) -> AliasTable:
        """Keep an alias.

        Raises:
            NameTaken, OutOfBounds: as the store does.
        """
        table = await asyncio.to_thread(self._aliases.put, alias, may_replace=may_replace)
        return await self._publish(table, f"{alias.name} stands for {alias.target.id}")

    async def remove(self, name: str) -> AliasTable:
        """Remove an alias, if it is there."""
        table = await asyncio.to_thread(self._aliases.remove, name)
        return await self._publish(table, f"{name} is removed")

    async def popular(self, base_id: str) -> tuple[AdapterSpec, ...]:
        """Return the adapters of a base that were requested most recently and often, the most used first."""
        return self._usage[base_id].most_used()

    async def account(self, drawn: Sequence[DayUsage]) -> Mapping[str, float]:
        """Keep what was drawn; return how long the last start of each base took, in seconds."""
        await asyncio.to_thread(self._ledger.add, drawn)
        return await asyncio.to_thread(self._ledger.start_times_s)

    async def usage(self, since: str) -> tuple[DayUsage, ...]:
        """Return what was drawn from a day on."""
        return await asyncio.to_thread(self._ledger.usage, since)

    async def started(self, base_id: str, start_s: float) -> None:
        """Keep how long a base took to start."""
        await asyncio.to_thread(self._ledger.note_start, base_id, start_s)

    async def claim(self, key: str) -> SharedFile | None:
        """Return a file, waiting for the node that fetches it; None means that the caller is to fetch it."""
        return await self._files.claim(key)

    async def announce(self, key: str, file: SharedFile) -> None:
        """Make a fetched file known."""
        self._files.announce(key, file)

    async def release_claim(self, key: str) -> None:
        """Take back a claim."""
        self._files.release_claim(key)

    async def invalidate(self, key: str, sha256: str) -> None:
        """Forget a file whose bytes could not be had."""
        self._files.invalidate(key, sha256)

    async def offer_base(self, snapshots: Sequence[HubSnapshot]) -> None:
        """Know which files of a base a node has."""
        self._bases.offer(snapshots)

    async def base_offers(self, repositories: Sequence[str]) -> tuple[HubSnapshot, ...]:
        """Return which nodes have which files of Hub repositories, what was offered last first."""
        nodes = await asyncio.to_thread(ray.nodes)
        return self._bases.of(repositories, {node["NodeID"] for node in nodes if node["Alive"]})

    async def _publish(self, table: AliasTable, what: str) -> AliasTable:
        async with self._changed:
            # Two changes may come back from their threads in the other order.
            if table.version.number > self._table.version.number:
                self._table = table
                log.info("alias %s; version %d", what, table.version.number)
                self._changed.notify_all()
        return table


def _alias_store(settings: RegistrySettings, environment: Environment) -> AliasStore | RedisAliasStore:
    if (redis := settings.redis or environment.registry_redis) is not None:
        return RedisAliasStore(redis.get_secret_value())
    return AliasStore(_file_of(settings, environment), clock=time.time)


def _file_of(settings: RegistrySettings, environment: Environment) -> Path:
    # Nodes get new ids when a cluster restarts; the head stays the head.
    return settings.path or Path(str(environment.cache_dir).replace(NODE, "head")) / FILE_NAME
