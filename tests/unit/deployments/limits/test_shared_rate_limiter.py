"""Limits of keys over several ingress replicas: real books, and a way to them that can be cut."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TypeVar

import pytest

from serve_app.api.http.limits import Grant
from serve_app.config import KeyLimits
from serve_app.deployments.limits.lease_table import Heartbeat, LeaseTable, RequestLease
from serve_app.deployments.limits.shared_rate_limiter import KeeperAway, SharedRateLimiter
from serve_app.errors import KeyLimitReached, LoraplexError, OutOfBounds

PATIENCE_S = 5.0
T = TypeVar("T")


class BooksKeeper:
    """Books in the same process; away when told so, and silent while `gate` is closed."""

    def __init__(self) -> None:
        self.now = 50.0
        self.asked = 0
        self.is_away = False
        self.gate = asyncio.Event()
        self.gate.set()
        self.has_heard = asyncio.Event()
        self.renew()

    def renew(self) -> None:
        """Forget everything, as a keeper does that was started again."""
        self.books = LeaseTable(clock=lambda: self.now, patience_s=PATIENCE_S)

    async def begin(self, holder: str, lease: RequestLease) -> KeyLimitReached | None:
        # Counted before it is answered, as for an answer that is lost.
        answer = self.books.begin(holder, lease) if not self.is_away else None
        return await self._answer(answer)

    async def spend(self, holder: str, lease: RequestLease, count: int) -> LoraplexError | None:
        return await self._answer(None if self.is_away else self.books.spend(holder, lease, count))

    async def end(self, holder: str, number: int, *, drew: bool) -> None:
        await self._answer(None)
        self.books.end(holder, number, drew=drew)

    async def apply_heartbeat(self, beat: Heartbeat) -> None:
        await self._answer(None)
        self.books.apply_heartbeat(beat)
        self.has_heard.set()

    async def _answer(self, answer: T) -> T:
        self.asked += 1
        await self.gate.wait()
        if self.is_away:
            raise KeeperAway
        return answer


@dataclass
class Service:
    """Two ingress replicas with one keeper; `by` says who let requests in."""

    keeper: BooksKeeper
    by: list[str] = field(default_factory=list[str])
    meters: list[SharedRateLimiter] = field(default_factory=list[SharedRateLimiter])

    def join(self, holder: str) -> SharedRateLimiter:
        self.meters.append(
            SharedRateLimiter(
                self.keeper,
                holder=holder,
                replicas=2,
                clock=lambda: self.keeper.now,
                on_grant=self.by.append,
                beat_s=3600,
            )
        )
        return self.meters[-1]

    async def beat(self) -> None:
        for meter in self.meters:
            await meter.beat()


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    service = Service(BooksKeeper())
    yield service
    for meter in service.meters:
        await meter.close()


def limits(**values: float) -> KeyLimits:
    return KeyLimits.model_validate(values)


async def let_in(meter: SharedRateLimiter, count: int, asked: KeyLimits) -> list[Grant]:
    """Ask so many times and return what was granted."""
    grants: list[Grant] = []
    for _ in range(count):
        try:
            grants.append(await meter.begin("alice", asked))
        except KeyLimitReached:
            continue
    return grants


async def told() -> None:
    """Let messages that nobody waits for arrive."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_two_ingress_replicas_grant_one_limit(service: Service) -> None:
    a, b = service.join("a"), service.join("b")
    grants = await let_in(a, 3, limits(concurrency=2)) + await let_in(b, 3, limits(concurrency=2))
    assert len(grants) == 2
    grants[0].end(drew=True)
    await told()
    assert len(await let_in(b, 3, limits(concurrency=2))) == 1
    assert service.by == ["keeper"] * 3


async def test_images_are_spent_from_one_account_and_come_back_undrawn(service: Service) -> None:
    a, b = service.join("a"), service.join("b")
    asked = limits(images_per_minute=4)
    (first,), (second,) = await let_in(a, 1, asked), await let_in(b, 1, asked)
    await first.spend_images(4)
    with pytest.raises(KeyLimitReached, match="4 images per minute"):
        await second.spend_images(1)
    first.end(drew=False)
    await told()
    await second.spend_images(4)
    with pytest.raises(OutOfBounds):
        await second.spend_images(5)


async def test_a_key_without_a_limit_of_images_asks_nobody_about_them(service: Service) -> None:
    (grant,) = await let_in(service.join("a"), 1, limits(concurrency=1))
    asked = service.keeper.asked
    await grant.spend_images(100)
    assert service.keeper.asked == asked


async def test_while_the_keeper_is_away_each_replica_grants_its_share(service: Service) -> None:
    a, b = service.join("a"), service.join("b")
    service.keeper.is_away = True
    assert [len(await let_in(meter, 5, limits(concurrency=4))) for meter in (a, b)] == [2, 2]
    assert [len(await let_in(meter, 5, limits(requests_per_s=1, burst=4))) for meter in (a, b)] == [2, 2]
    assert [len(await let_in(meter, 5, limits(concurrency=1))) for meter in (a, b)] == [1, 1], "at least one"
    assert set(service.by) == {"share"}


async def test_more_images_than_a_share_are_drawn_on_credit(service: Service) -> None:
    a = service.join("a")
    service.keeper.is_away = True
    (grant,) = await let_in(a, 1, limits(images_per_minute=6))
    await grant.spend_images(6)
    with pytest.raises(KeyLimitReached) as refusal:
        await grant.spend_images(1)
    # Three a minute is its share, and it owes three.
    assert refusal.value.retry_after_s == 80
    service.keeper.now += 80
    await grant.spend_images(1)


async def test_the_keeper_s_end_gives_no_second_burst(service: Service) -> None:
    a = service.join("a")
    asked = limits(requests_per_s=1, burst=4)
    assert len(await let_in(a, 9, asked)) == 4
    service.keeper.is_away = True
    assert await let_in(a, 3, asked) == []
    service.keeper.now += 2
    assert len(await let_in(a, 3, asked)) == 1


async def test_only_one_request_waits_for_a_keeper_that_is_away(service: Service) -> None:
    a = service.join("a")
    service.keeper.is_away = True
    await let_in(a, 1, limits(concurrency=100))
    asked = service.keeper.asked
    await let_in(a, 50, limits(concurrency=100))
    assert service.keeper.asked == asked
    service.keeper.is_away = False
    await a.beat()
    await let_in(a, 1, limits(concurrency=100))
    assert service.by[-1] == "keeper"


async def test_a_new_keeper_knows_what_was_let_in_before_and_without_it(service: Service) -> None:
    a, b = service.join("a"), service.join("b")
    asked = limits(concurrency=4)
    assert len(await let_in(a, 1, asked)) == 1
    service.keeper.is_away = True
    service.keeper.renew()
    assert len(await let_in(b, 5, asked)) == 2
    service.keeper.is_away = False
    await service.beat()
    assert service.keeper.books.under_way == 3
    assert len(await let_in(a, 5, asked)) == 1


async def test_what_is_let_in_while_a_keeper_is_told_of_the_rest_is_told_before_it_grants(service: Service) -> None:
    a = service.join("a")
    asked = limits(concurrency=4)
    service.keeper.is_away = True
    assert len(await let_in(a, 1, asked)) == 1
    service.keeper.is_away = False
    service.keeper.gate.clear()
    beating = asyncio.ensure_future(a.beat())
    await told()
    assert len(await let_in(a, 5, asked)) == 1, "still its share, of which one is left"
    service.keeper.gate.set()
    await beating
    assert service.keeper.books.under_way == 2
    assert len(await let_in(a, 5, asked)) == 2
    assert service.by == ["share", "share", "keeper", "keeper"]


async def test_an_ingress_replica_that_dies_holds_nothing_for_long(service: Service) -> None:
    dead, b = service.join("dead"), service.join("b")
    assert len(await let_in(dead, 2, limits(concurrency=2))) == 2
    assert await let_in(b, 1, limits(concurrency=2)) == []
    service.keeper.now += PATIENCE_S + 1
    await b.beat()
    assert len(await let_in(b, 3, limits(concurrency=2))) == 2


async def test_a_request_that_is_given_up_while_it_asks_holds_nothing(service: Service) -> None:
    a = service.join("a")
    service.keeper.gate.clear()
    asking = asyncio.ensure_future(a.begin("alice", limits(concurrency=1)))
    await told()
    assert service.keeper.books.under_way == 1
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    service.keeper.gate.set()
    await told()
    assert service.keeper.books.under_way == 0


async def test_an_end_that_is_lost_is_made_good_by_the_next_heartbeat(service: Service) -> None:
    a = service.join("a")
    (grant,) = await let_in(a, 1, limits(concurrency=1))
    service.keeper.is_away = True
    grant.end(drew=True)
    await told()
    service.keeper.is_away = False
    assert service.keeper.books.under_way == 1
    await a.beat()
    assert service.keeper.books.under_way == 0
    assert len(await let_in(a, 1, limits(concurrency=1))) == 1


async def test_heartbeats_go_on_by_themselves_from_the_first_request_with_limits(service: Service) -> None:
    meter = SharedRateLimiter(service.keeper, holder="c", replicas=2, clock=lambda: 0.0, beat_s=0.001)
    service.meters.append(meter)
    grant = await meter.begin("alice", limits(concurrency=1))
    service.keeper.renew()
    service.keeper.has_heard.clear()
    async with asyncio.timeout(60):
        await service.keeper.has_heard.wait()
    assert service.keeper.books.under_way == 1
    grant.end(drew=True)
