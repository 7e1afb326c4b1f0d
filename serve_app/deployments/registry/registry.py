"""The registry behind the HTTP layer: what is known, where it is resident, and how that is changed.

Owns putting together what the catalog, the aliases and the replicas know. Must not know Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from serve_app.adapter_defaults import NO_DEFAULTS
from serve_app.catalog.catalog import Catalog
from serve_app.catalog.pictures import AdapterPictures, Shrink
from serve_app.catalog.reading.repository import is_valid_id
from serve_app.catalog.replica_report import (
    FASTEST_FIRST,
    BaseState,
    DayUsage,
    HeldIn,
    KnownAdapter,
    LoraReport,
    Preloaded,
    QuarantinedAdapters,
    Removal,
    ReplicaReport,
)
from serve_app.catalog.resolving.aliases import Alias, told_as
from serve_app.config import BaseModelConfig
from serve_app.core import AdapterRef, AdapterSpec, HubToken
from serve_app.errors import LoraplexError, MalformedRequest, NameTaken, NotReady
from serve_app.families.family import Family
from serve_app.settings import Canary

if TYPE_CHECKING:
    from serve_app.deployments.registry.fleet import Fleet
    from serve_app.deployments.registry.keeper_client import KeeperClient

log = logging.getLogger(__name__)


class ServiceRegistry:
    """The registry of one ingress replica."""

    def __init__(
        self,
        catalog: Catalog,
        aliases: KeeperClient,
        replicas: Fleet,
        *,
        pictures: AdapterPictures,
        check_defaults: Callable[[AdapterSpec, BaseModelConfig, Family | None], None],
        states: Callable[[], Awaitable[Mapping[str, BaseState]]],
    ) -> None:
        """`check_defaults` refuses defaults of an adapter that a base could not draw with; `states` says what each base
        does."""
        self._states = states
        self._check_defaults = check_defaults
        self._catalog = catalog
        self._pictures = pictures
        self._aliases = aliases
        self._replicas = replicas

    def bases(self) -> tuple[BaseModelConfig, ...]:
        """Return the bases that are served."""
        return self._catalog.served()

    def default_base(self) -> BaseModelConfig:
        """Return the base that serves a request which names none."""
        return self._catalog.default()

    def canaries(self) -> Mapping[str, Canary]:
        """Return the canaries, by the bases some of whose requests they draw."""
        return self._catalog.canaries()

    async def states(self) -> Mapping[str, BaseState]:
        """Return what each base does."""
        states = await self._states()
        return {base.id: states[base.id] for base in self.bases() if base.id in states}

    async def usage(self, since: str) -> tuple[DayUsage, ...]:
        """Return what was drawn from a day on.

        Raises:
            NotReady: the keeper is away.
        """
        return await self._aliases.usage(since)

    async def replicas(self, *, token: HubToken | None) -> tuple[ReplicaReport, ...]:
        """Return the replicas of every base, each with those of its adapters that the caller may know of."""
        reports = await self._replicas.reports()
        held = {one.id for report in reports for one in (*report.holdings, *report.applied)}
        visible = await self._catalog.visible(held, token)
        return tuple(_showing(report, visible) for report in reports)

    async def aliased(self, *, token: HubToken | None = None) -> tuple[tuple[Alias, KnownAdapter], ...]:
        """Return the aliases that a caller may use, each with its adapter, sorted by name."""

        async def resolved(alias: Alias) -> tuple[Alias, KnownAdapter] | None:
            with contextlib.suppress(LoraplexError):
                return alias, await self._catalog.lookup_adapter(alias.target, token=token, is_listing=True)
            return None

        aliases = sorted(self._aliases.table.aliases.values(), key=lambda alias: alias.name)
        found = await asyncio.gather(*(resolved(alias) for alias in aliases))
        return tuple(pair for pair in found if pair is not None)

    async def loras(self, *, token: HubToken | None) -> tuple[LoraReport, ...]:
        """Return the adapters known so far and the aliases, sorted by id."""
        known, reports, aliased = await asyncio.gather(
            self._catalog.known(), self._replicas.reports(), self.aliased(token=token)
        )
        names = self._aliases.table.names_of
        rows = [LoraReport(one.spec.id, one, aliases=names(one.spec.id)) for one in known]
        rows += [LoraReport(alias.name, one, alias_of=one.spec.id) for alias, one in aliased]
        usage_by_key = _AdapterUsage(reports)
        return tuple(usage_by_key.with_usage(row) for row in sorted(rows, key=lambda row: row.id))

    async def lora(self, name: str, *, token: HubToken | None) -> LoraReport:
        """Return one adapter or alias.

        Raises:
            LoraplexError: the name cannot be resolved.
        """
        adapter = await self._looked_up(name, token)
        is_alias = name in self._aliases.table.aliases
        row = LoraReport(
            name,
            adapter,
            alias_of=adapter.spec.id if is_alias else None,
            aliases=() if is_alias else self._aliases.table.names_of(name),
        )
        return _AdapterUsage(await self._replicas.reports()).with_usage(row)

    async def picture(self, name: str, shrink: Shrink, *, token: HubToken | None) -> bytes | None:
        """Return the picture of an adapter or alias, made small by `shrink`; None where there is none.

        Raises:
            NoPicture: the picture that comes with it cannot be shown.
            LoraplexError: the name cannot be resolved.
        """
        target = self._aliases.resolve_alias(AdapterRef(name))
        with told_as(name, target.id):
            return await self._pictures.find(target, shrink, token=token)

    async def keep_picture(self, name: str, picture: bytes, *, token: HubToken | None) -> None:
        """Keep a picture that was drawn with an adapter; raises as `picture` does."""
        await self._pictures.keep(self._aliases.resolve_alias(AdapterRef(name)), picture, token=token)

    async def add_alias(self, alias: Alias, *, may_replace: bool, preload: int, token: HubToken | None) -> LoraReport:
        """Keep an alias whose target can be served, and have so many replicas fetch it.

        Raises:
            MalformedRequest: the name can be none, the target is an alias itself, or its base cannot draw with the
                defaults.
            NameTaken: the name means something else.
            LoraplexError: the target cannot be resolved.
        """
        if not is_valid_id(alias.name):
            raise MalformedRequest("'lora_name' may hold letters, digits, '.', '_', '-' and one '/' between them")
        if alias.target.id in self._aliases.table.aliases:
            raise MalformedRequest("'source.uri' is an alias itself; name the adapter that it stands for")
        if any(alias.name in base.names for base in self.bases()):
            raise NameTaken(alias.name, "it is a base model")
        adapter = await self._catalog.lookup_adapter(alias.target, token=token)
        if alias.target.defaults != NO_DEFAULTS:
            base = next(base for base in self.bases() if base.id == adapter.spec.base_id)
            self._check_defaults(adapter.spec, base, await self._catalog.family(base))
        if alias.name not in self._aliases.table.aliases and await self._catalog.name_exists(alias.name):
            raise NameTaken(alias.name, "an adapter has this id")
        await self._aliases.put(alias, may_replace=may_replace)
        if preload:
            await self._preload(adapter.spec, preload, token)
        reports = await self._replicas.reports(is_fresh=bool(preload))
        return _AdapterUsage(reports).with_usage(LoraReport(alias.name, adapter, alias_of=adapter.spec.id))

    async def remove(self, name: str, *, token: HubToken | None) -> Removal:
        """Remove an alias, and have every replica forget the adapter once it is not in use.

        Raises:
            LoraplexError: the name is no alias and cannot be resolved.
        """
        if name not in self._aliases.table.aliases:
            # It may have been made through another ingress a moment ago.
            await self._aliases.refresh()
        alias = self._aliases.table.aliases.get(name)
        if alias is None:
            model = (await self._catalog.lookup_adapter(AdapterRef(name), token=token)).spec.id
        else:
            await self._aliases.remove(name)
            model = alias.target.id
        replicas = await self._replicas.forget(model)
        log.info("%s is removed; %d replicas forget %s", name, len(replicas), model)
        return Removal(name, was_alias=alias is not None, replicas=replicas)

    async def preload(self, name: str, replicas: int, *, token: HubToken | None) -> Preloaded:
        """Have so many replicas hold an adapter in memory.

        Raises:
            LoraplexError: it cannot be resolved or fetched.
        """
        adapter = await self._looked_up(name, token)
        return await self._preload(adapter.spec, replicas, token)

    async def _looked_up(self, name: str, token: HubToken | None) -> KnownAdapter:
        target = self._aliases.resolve_alias(AdapterRef(name))
        with told_as(name, target.id):
            return await self._catalog.lookup_adapter(target, token=token)

    async def _preload(self, spec: AdapterSpec, count: int, token: HubToken | None) -> Preloaded:
        reports = await self._replicas.reports(is_fresh=True)
        running = [report for report in reports if report.base_id == spec.base_id and report.state != "STARTING"]
        if not running:
            raise NotReady(spec.base_id)

        def order(report: ReplicaReport) -> tuple[Any, ...]:
            # One that was slow to say what it does may well fetch; it is asked where no other is left.
            return report.state == "SILENT", not _holds(report, spec.key), report.backlog_s, report.id

        chosen = sorted(running, key=order)[:count]
        held = await self._replicas.preload(spec, [report.id for report in chosen], token=token)
        log.info("%s was preloaded on %d of %d replicas", spec.key, len(held), count)
        return Preloaded(spec, tuple(sorted(held)), count)


class _AdapterUsage:
    """The state of each adapter over all replicas."""

    def __init__(self, reports: Sequence[ReplicaReport]) -> None:
        self._resident: defaultdict[str, list[tuple[str, HeldIn]]] = defaultdict(list)
        self._hits: defaultdict[str, int] = defaultdict(int)
        self._last_used_s: dict[str, float] = {}
        self._layers: dict[str, int] = {}
        self._quarantined: defaultdict[str, list[tuple[str, QuarantinedAdapters]]] = defaultdict(list)
        for report in reports:
            for held in report.holdings:
                self._resident[held.key].append((report.id, held.tier))
            for refused in report.quarantined:
                for key in refused.keys:
                    self._quarantined[key].append((report.id, refused))
            for use in report.uses:
                self._hits[use.key] += use.hits
                self._layers[use.key] = use.layers_matched
                if use.hits:
                    self._last_used_s[use.key] = max(use.last_used_s, self._last_used_s.get(use.key, 0.0))

    def with_usage(self, row: LoraReport) -> LoraReport:
        """Return a row with what replicas say of its adapter."""
        key = row.adapter.spec.key
        return replace(
            row,
            resident=tuple(sorted(self._resident[key], key=lambda held: (FASTEST_FIRST.index(held[1]), held[0]))),
            hits=self._hits[key],
            last_used_s=self._last_used_s.get(key),
            layers_matched=self._layers.get(key),
            quarantined=tuple(sorted(self._quarantined[key], key=lambda held: (-held[1].left_s, held[0]))),
        )


def _showing(report: ReplicaReport, visible: frozenset[str]) -> ReplicaReport:
    return replace(
        report,
        applied=tuple(one for one in report.applied if one.id in visible),
        holdings=tuple(one for one in report.holdings if one.id in visible),
    )


def _holds(report: ReplicaReport, key: str) -> bool:
    return any(held.key == key for held in report.holdings)
