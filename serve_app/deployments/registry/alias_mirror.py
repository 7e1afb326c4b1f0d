"""The aliases as one ingress replica knows them: the keeper's, a moment later.

Owns following the keeper. While the keeper is away, what was known last holds on. Must not know Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Protocol

from serve_app.catalog.resolving.aliases import NOTHING_YET, Alias, AliasTable, TableVersion
from serve_app.core import AdapterRef
from serve_app.errors import NotReady

log = logging.getLogger(__name__)

RETRY_S = 0.5


class AliasService(Protocol):
    """Whoever holds the aliases."""

    async def watch(self, known: TableVersion) -> AliasTable | None:
        """Return the aliases once they are others than at the version known; None where that takes too long."""
        ...

    async def put(self, alias: Alias, *, may_replace: bool) -> AliasTable:
        """Keep an alias and return all."""
        ...

    async def remove(self, name: str) -> AliasTable:
        """Remove an alias and return all."""
        ...


class AliasMirror:
    """Follows a keeper; changes made through it hold here at once, others as soon as the keeper tells.

    Invariant: within one epoch the version never goes back.
    """

    def __init__(
        self, keeper: AliasService, *, on_change: Callable[[int], None] = lambda _: None, retry_s: float = RETRY_S
    ) -> None:
        """Know nothing yet; `on_change` is told how many aliases are known."""
        self._keeper = keeper
        self._on_change = on_change
        self._retry_s = retry_s
        self._table = AliasTable()
        self._heard = asyncio.Event()
        self._following: asyncio.Task[None] | None = None

    @property
    def table(self) -> AliasTable:
        """All aliases, as far as known."""
        return self._table

    def resolve_alias(self, ref: AdapterRef) -> AdapterRef:
        """Return the adapter that a request means."""
        return self._table.resolve_alias(ref)

    async def begin(self, *, patience_s: float) -> None:
        """Follow the keeper from now on; return once it has told all, or patience is out."""
        self._following = asyncio.create_task(self._follow(), name="aliases")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._heard.wait(), patience_s)
        if not self._heard.is_set():
            log.warning("no aliases are known yet: the registry has not answered in %g s", patience_s)

    async def refresh(self) -> None:
        """Know at once what the keeper knows; while it is away, what was known last holds on."""
        try:
            self._adopt(await self._keeper.watch(NOTHING_YET) or self._table)
        except NotReady:
            log.info("the registry is away; the aliases known last hold on")

    async def close(self) -> None:
        """Follow no more."""
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)

    async def put(self, alias: Alias, *, may_replace: bool) -> None:
        """Have an alias kept."""
        self._adopt(await self._keeper.put(alias, may_replace=may_replace))

    async def remove(self, name: str) -> None:
        """Have an alias removed."""
        self._adopt(await self._keeper.remove(name))

    def _adopt(self, table: AliasTable) -> None:
        new, old = table.version, self._table.version
        if new.epoch != old.epoch or new.number > old.number:
            self._table = table
            self._on_change(len(table.aliases))
            log.info("%d aliases are known, at version %d", len(table.aliases), new.number)
        self._heard.set()

    async def _follow(self) -> None:
        is_away = False
        while True:
            try:
                watch = await self._keeper.watch(self._table.version)
            except Exception as error:  # noqa: BLE001 - whatever it is, the aliases known last hold on
                if not is_away:
                    log.warning("the registry is away (%s); the aliases known last hold on", type(error).__name__)
                is_away = True
                await asyncio.sleep(self._retry_s)
                continue
            if is_away:
                log.info("the registry is back")
            is_away = False
            if watch is not None:
                self._adopt(watch)
