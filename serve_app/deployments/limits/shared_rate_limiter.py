"""Counting what keys ask for over all ingress replicas: one ingress replica's side of it.

Owns asking the keeper of limits, telling it what is under way here, and the share of the limits that is granted while
the keeper is away. Must not know Ray.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Protocol, TypeVar

from serve_app.api.http.limits import Grant, KeyQuota, KeyQuotas
from serve_app.config import KeyLimits
from serve_app.deployments.limits.lease_table import Heartbeat, RequestLease
from serve_app.errors import KeyLimitReached, LoraplexError

log = logging.getLogger(__name__)

T = TypeVar("T")

# How often an ingress replica tells what it has under way; also, how soon it notices that the keeper is back.
HEARTBEAT_S = 1.0
# After so long without a word an ingress replica counts as gone, and what it had under way as over.
PATIENCE_S = 5.0


class KeeperAway(Exception):
    """The keeper of limits did not answer."""


class RateLimitService(Protocol):
    """Whoever keeps the books; each method raises `KeeperAway` where there is no answer in time."""

    async def begin(self, holder: str, lease: RequestLease) -> KeyLimitReached | None:
        """Let a request in, or return why not."""
        ...

    async def spend(self, holder: str, lease: RequestLease, count: int) -> LoraplexError | None:
        """Take images off what the key of a request may draw, or return why not."""
        ...

    async def end(self, holder: str, number: int, *, drew: bool) -> None:
        """Note that a request is over."""
        ...

    async def apply_heartbeat(self, beat: Heartbeat) -> None:
        """Put the books of a holder right."""
        ...


class SharedRateLimiter:
    """Lets requests in as the keeper's books allow; while it is away, as this replica's share of the limits allows.

    A share is a limit divided by the number of ingress replicas, and at least one. What the keeper granted counts on it
    too, so that the keeper's end gives nobody a second burst.
    """

    def __init__(
        self,
        keeper: RateLimitService,
        *,
        holder: str,
        replicas: int,
        clock: Callable[[], float],
        on_grant: Callable[[str], None] = lambda _: None,
        beat_s: float = HEARTBEAT_S,
    ) -> None:
        """Have nothing under way; `holder` is a name that no other ingress replica has or had."""
        self._keeper = keeper
        self._holder = holder
        self._shares = KeyQuotas(clock=clock, share=1 / replicas)
        self._on_grant = on_grant
        self._beat_s = beat_s
        self._last = 0
        self._asked: set[int] = set()
        self._held: dict[int, RequestLease] = {}
        self._is_away = False
        self._beating: asyncio.Task[None] | None = None
        self._telling: set[asyncio.Task[None]] = set()

    async def begin(self, key: str, limits: KeyLimits) -> Grant:
        """Let a request in.

        Raises:
            KeyLimitReached: it came too soon, or too many are under way.
        """
        if self._beating is None:
            self._beating = asyncio.create_task(self._beat_on(), name="key limits")
        self._last += 1
        lease, share = RequestLease(self._last, key, limits), self._shares.of(key, limits)
        self._asked.add(lease.number)
        try:
            by = await self._let_in(lease, share)
        except asyncio.CancelledError:
            # It may have been granted all the same.
            self._tell_end(lease, drew=False)
            raise
        finally:
            self._asked.discard(lease.number)
        self._held[lease.number] = lease
        self._on_grant(by)
        return _SharedGrant(self, lease, share)

    async def spend(self, lease: RequestLease, share: KeyQuota, count: int) -> None:
        """Take images off.

        Raises:
            KeyLimitReached, OutOfBounds: as the books say.
        """
        try:
            refusal = await self._ask(lambda: self._keeper.spend(self._holder, lease, count))
        except KeeperAway:
            share.spend_images(count)
            return
        if refusal is not None:
            raise refusal
        share.adopt_images(count)

    def end(self, lease: RequestLease, *, drew: bool) -> None:
        """Note that a request is over."""
        self._held.pop(lease.number, None)
        self._tell_end(lease, drew=drew)

    async def beat(self) -> None:
        """Tell the keeper what is under way here.

        One that was away grants again once it knows all of it: what this replica's share let in while a message was
        on its way is told in another.
        """
        while True:
            held, asked = tuple(self._held.values()), frozenset(self._asked)
            try:
                await self._keeper.apply_heartbeat(Heartbeat(self._holder, self._last, held, asked))
            except KeeperAway:
                self._note(is_away=True)
                return
            if not self._is_away or self._held.keys() <= {lease.number for lease in held}:
                self._note(is_away=False)
                return

    async def close(self) -> None:
        """Tell no more."""
        tasks = [*self._telling, *([self._beating] if self._beating else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _let_in(self, lease: RequestLease, share: KeyQuota) -> str:
        """Return who let a request in."""
        try:
            refusal = await self._ask(lambda: self._keeper.begin(self._holder, lease))
        except KeeperAway:
            share.begin()
            return "share"
        if refusal is not None:
            raise refusal
        share.adopt()
        return "keeper"

    async def _ask(self, question: Callable[[], Awaitable[T]]) -> T:
        # Only one request's patience is tried: until a heartbeat gets through, nobody asks.
        if self._is_away:
            raise KeeperAway
        try:
            return await question()
        except KeeperAway:
            self._note(is_away=True)
            raise

    def _tell_end(self, lease: RequestLease, *, drew: bool) -> None:
        # The next heartbeat says it too, should this be lost; only the images would stay spent.
        if not self._is_away:
            self._tell(self._keeper.end(self._holder, lease.number, drew=drew))

    def _tell(self, message: Coroutine[Any, Any, None]) -> None:
        async def told() -> None:
            try:
                await message
            except KeeperAway:
                self._note(is_away=True)

        task = asyncio.create_task(told())
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    def _note(self, *, is_away: bool) -> None:
        if is_away and not self._is_away:
            log.warning("the keeper of limits is away; keys with limits get this ingress replica's share of them")
        elif self._is_away and not is_away:
            log.info("the keeper of limits is back")
        self._is_away = is_away

    async def _beat_on(self) -> None:
        while True:
            await asyncio.sleep(self._beat_s)
            await self.beat()


class _SharedGrant:
    """One request that was let in."""

    def __init__(self, meter: SharedRateLimiter, lease: RequestLease, share: KeyQuota) -> None:
        self._meter = meter
        self._lease = lease
        self._share = share
        self._spent = 0

    async def spend_images(self, count: int) -> None:
        """Take images off; free where the key has no limit of images."""
        if self._lease.limits.images_per_minute is None:
            return
        await self._meter.spend(self._lease, self._share, count)
        self._spent += count

    def end(self, *, drew: bool) -> None:
        """Give back what came to nothing."""
        self._share.end()
        if not drew:
            self._share.return_images(self._spent)
        self._meter.end(self._lease, drew=drew)
