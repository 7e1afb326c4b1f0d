"""The registry's neighbours without a cluster: a keeper over the real store, and replicas that hold what one says."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, cast

from serve_app.catalog.replica_report import DayUsage, ReplicaReport
from serve_app.catalog.resolving.aliases import Alias, AliasStore, AliasTable, TableVersion
from serve_app.core import AdapterSpec, HubToken
from serve_app.deployments.registry.keeper_client import KeeperClient
from serve_app.errors import NotReady
from tests.unit.deployments.local_handle import LocalHandle


class StoreKeeper:
    """The keeper's part in one process; away for as long as it `is_away`, and without aliases where it has no store."""

    def __init__(self, store: AliasStore | None = None) -> None:
        self.store = store
        self.is_away = False
        self.asked = 0
        self.changed = asyncio.Condition()
        self.used: Counter[AdapterSpec] = Counter()
        self.drawn: list[DayUsage] = []
        self.start_times_s: dict[str, float] = {}

    def client(self, **settings: Any) -> KeeperClient:
        return KeeperClient(cast(Any, LocalHandle(self)), **settings)

    async def watch(self, known: TableVersion, uses: Mapping[AdapterSpec, int]) -> AliasTable | None:
        self.asked += 1
        self.used.update(uses)
        async with self.changed:
            self.changed.notify_all()
            self._answering()
            await self.changed.wait_for(lambda: self.is_away or self._table().version != known)
            self._answering()
        return self._table()

    async def account(self, drawn: Sequence[DayUsage]) -> Mapping[str, float]:
        self._answering()
        self.drawn += drawn
        return self.start_times_s

    async def usage(self, since: str) -> tuple[DayUsage, ...]:
        self._answering()
        return tuple(row for row in self.drawn if row.day >= since)

    async def put(self, alias: Alias, *, may_replace: bool) -> AliasTable:
        self._answering()
        assert self.store is not None
        table = self.store.put(alias, may_replace=may_replace)
        return await self._told(table)

    async def remove(self, name: str) -> AliasTable:
        self._answering()
        assert self.store is not None
        return await self._told(self.store.remove(name))

    async def leave(self) -> None:
        self.is_away = True
        await self._told(AliasTable())

    async def _told(self, table: AliasTable) -> AliasTable:
        async with self.changed:
            self.changed.notify_all()
        return table

    def _table(self) -> AliasTable:
        return AliasTable() if self.store is None else self.store.table()

    def _answering(self) -> None:
        if self.is_away:
            raise NotReady("the registry")


class FakeReplicas:
    """Replicas that report what they are told to, and note what they are asked to do."""

    def __init__(self, *reports: ReplicaReport) -> None:
        self.said = reports
        self.forgotten: list[str] = []
        self.preloaded: list[tuple[str, tuple[str, ...], HubToken | None]] = []

    async def reports(self, *, is_fresh: bool = False) -> tuple[ReplicaReport, ...]:
        return self.said

    async def forget(self, model: str) -> tuple[str, ...]:
        self.forgotten.append(model)
        return tuple(report.id for report in self.said if any(held.id == model for held in report.holdings))

    async def preload(self, spec: AdapterSpec, replicas: Sequence[str], *, token: HubToken | None) -> tuple[str, ...]:
        self.preloaded.append((spec.id, tuple(replicas), token))
        return tuple(replicas)
