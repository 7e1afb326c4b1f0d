"""The keeper as one ingress replica knows it: its aliases, a moment later.

Owns following the keeper, and telling it what is used. While it is away, what was known last stays valid, and what was
drawn is counted here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from serve_app.catalog.replica_report import DayUsage
from serve_app.catalog.resolving.aliases import NOTHING_YET, Alias, AliasTable, TableVersion
from serve_app.core import AdapterRef, AdapterSpec
from serve_app.deployments.registry.keeper import HOLD_S, KEEPER_NAME
from serve_app.deployments.registry.usage import Drawn
from serve_app.errors import LoraplexError, NotReady

log = logging.getLogger(__name__)

RETRY_S = 0.5
# A change is asked for by a person, who should hear of a keeper that hangs.
CHANGE_TIMEOUT_S = 10.0

T = TypeVar("T")


def keeper_of(service: str) -> DeploymentHandle:
    """Return the way to the keeper of a service; calls wait for it where its application starts later."""
    # `get_deployment_handle` refuses what is not there yet.
    return DeploymentHandle(KEEPER_NAME, service)


class KeeperClient:
    """Follows a keeper; changes made through it hold here at once, others as soon as the keeper reports them.

    Invariant: within one epoch the version never goes back.
    """

    def __init__(
        self, keeper: DeploymentHandle, *, on_change: Callable[[int], None] = lambda _: None, retry_s: float = RETRY_S
    ) -> None:
        """Know nothing yet; `on_change` gets the number of aliases."""
        # A response has other types with streams than without, which Ray's own types mix.
        self._keeper: Any = keeper
        self._on_change = on_change
        self._retry_s = retry_s
        self._table = AliasTable()
        self._uses: Counter[AdapterSpec] = Counter()
        self._drawn = Drawn(time.time)
        self._start_times_s: Mapping[str, float] = {}
        self._heard = asyncio.Event()
        self._following: asyncio.Task[None] | None = None

    @property
    def table(self) -> AliasTable:
        """All aliases, as far as known."""
        return self._table

    def resolve_alias(self, ref: AdapterRef) -> AdapterRef:
        """Return the adapter that a request means."""
        return self._table.resolve_alias(ref)

    def note_use(self, spec: AdapterSpec) -> None:
        """Count a request for an adapter; the keeper learns of it within seconds."""
        self._uses[spec] += 1

    def note_drawn(self, key: str | None, base_id: str, *, images: int, device_s: float) -> None:
        """Count what a key got; the keeper learns of it within seconds."""
        self._drawn.note(key, base_id, images=images, device_s=device_s)

    def start_times_s(self) -> Mapping[str, float]:
        """Return how long the last start of each base took, as far as known."""
        return self._start_times_s

    async def usage(self, since: str) -> tuple[DayUsage, ...]:
        """Return what was drawn from a day on, what was drawn through other ingress replicas a moment later.

        Raises:
            NotReady: the keeper is away.
        """
        await self._account()
        return await _answer(self._keeper.usage.remote(since), CHANGE_TIMEOUT_S)

    async def begin(self, *, patience_s: float) -> None:
        """Follow the keeper from now on; return once it has answered, or patience is out."""
        self._following = asyncio.create_task(self._follow(), name="aliases")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._heard.wait(), patience_s)
        if not self._heard.is_set():
            log.warning("no aliases are known yet: the registry has not answered in %g s", patience_s)

    async def refresh(self) -> None:
        """Know at once what the keeper knows; while it is away, what was known last stays valid."""
        try:
            self._adopt(await self._watch(NOTHING_YET) or self._table)
        except NotReady:
            log.info("the registry is away; the aliases known last stay valid")

    async def close(self) -> None:
        """Follow no more."""
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)

    async def put(self, alias: Alias, *, may_replace: bool) -> None:
        """Have an alias kept.

        Raises:
            NotReady: the keeper is away.
            NameTaken, OutOfBounds: as the store does.
        """
        self._adopt(await _answer(self._keeper.put.remote(alias, may_replace=may_replace), CHANGE_TIMEOUT_S))

    async def remove(self, name: str) -> None:
        """Have an alias removed.

        Raises:
            NotReady: the keeper is away.
        """
        self._adopt(await _answer(self._keeper.remove.remote(name), CHANGE_TIMEOUT_S))

    async def _watch(self, known: TableVersion) -> AliasTable | None:
        uses, self._uses = self._uses, Counter()
        return await _answer(self._keeper.watch.remote(known, uses), HOLD_S + CHANGE_TIMEOUT_S)

    async def _account(self) -> None:
        drawn = self._drawn.take()
        try:
            self._start_times_s = await _answer(self._keeper.account.remote(drawn), CHANGE_TIMEOUT_S)
        except BaseException:
            self._drawn.put_back(drawn)
            raise

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
                table = await self._watch(self._table.version)
                if table is not None:
                    self._adopt(table)
                await self._account()
            except Exception as error:  # noqa: BLE001 - after any failure the aliases known last stay valid
                if not is_away:
                    log.warning("the registry is away (%s); the aliases known last stay valid", type(error).__name__)
                is_away = True
                await asyncio.sleep(self._retry_s)
                continue
            if is_away:
                log.info("the registry is back")
            is_away = False


async def _answer(response: Awaitable[T], timeout_s: float) -> T:
    """Return the keeper's answer, with its own errors out of Ray's wrapping."""
    try:
        async with asyncio.timeout(timeout_s):
            return await response
    except LoraplexError as error:
        raise getattr(error, "cause", error) from None
    except RayTaskError as error:
        raise error.cause from None
    except (RayError, RayServeException, TimeoutError):
        raise NotReady("the registry") from None
