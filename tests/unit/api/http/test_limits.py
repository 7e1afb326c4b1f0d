from __future__ import annotations

import asyncio
import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.api.http.caller import accounts_of, asked_by
from serve_app.api.http.limits import MAX_DELAYED_REFUSALS, REFUSAL_DELAY_S, KeyQuota, UnknownIdLimit
from serve_app.config import KeyLimits
from serve_app.errors import (
    AccessDenied,
    HubUnavailable,
    KeyLimitReached,
    LoraplexError,
    ModelNotFound,
    OutOfBounds,
    UnknownIdLimitReached,
)
from serve_app.refusals import RankTooHigh
from tests.clock import Clock


def allowance(clock: Clock, **limits: float) -> KeyQuota:
    return KeyQuota("alice", KeyLimits.model_validate(limits), clock=clock)


def waits(allowed: KeyQuota) -> int:
    """How long the next request is told to wait: 0 where it is let in."""
    try:
        allowed.begin()
    except KeyLimitReached as refusal:
        return refusal.retry_after_s
    allowed.end()
    return 0


def test_a_burst_is_let_in_and_then_the_rate_holds() -> None:
    clock = Clock(50.0)
    allowed = allowance(clock, requests_per_s=0.5, burst=3)
    assert [waits(allowed) for _ in range(4)] == [0, 0, 0, 2]
    clock.now += 2
    assert [waits(allowed) for _ in range(2)] == [0, 2]
    clock.now += 1000
    assert [waits(allowed) for _ in range(4)] == [0, 0, 0, 2]


def test_a_key_without_limits_has_none() -> None:
    allowed = allowance(Clock(50.0))
    allowed.spend_images(10_000)
    assert [waits(allowed) for _ in range(1000)] == [0] * 1000


def test_requests_at_once_are_counted_until_they_are_answered() -> None:
    allowed = allowance(Clock(50.0), concurrency=2)
    allowed.begin()
    allowed.begin()
    with pytest.raises(KeyLimitReached, match="2 requests at once"):
        allowed.begin()
    allowed.end()
    allowed.begin()


def test_a_request_that_is_turned_away_for_concurrency_costs_no_rate() -> None:
    allowed = allowance(Clock(50.0), concurrency=1, requests_per_s=1, burst=2)
    allowed.begin()
    for _ in range(5):
        with pytest.raises(KeyLimitReached, match="at once"):
            allowed.begin()
    allowed.end()
    assert waits(allowed) == 0


def test_images_are_counted_and_come_back_where_none_were_drawn() -> None:
    clock = Clock(50.0)
    allowed = allowance(clock, images_per_minute=6)
    allowed.spend_images(4)
    with pytest.raises(KeyLimitReached, match="6 images per minute") as refusal:
        allowed.spend_images(3)
    assert refusal.value.retry_after_s == 10
    allowed.return_images(4)
    allowed.spend_images(6)


def test_more_images_than_a_minute_holds_are_never_promised() -> None:
    with pytest.raises(OutOfBounds, match="at most 6"):
        allowance(Clock(50.0), images_per_minute=6).spend_images(7)


@given(
    rate=st.floats(0.01, 100),
    burst=st.integers(1, 20),
    gaps=st.lists(st.floats(0, 30), max_size=30),
)
def test_whoever_waits_as_long_as_was_said_is_let_in(rate: float, burst: int, gaps: list[float]) -> None:
    clock = Clock(50.0)
    allowed = allowance(clock, requests_per_s=rate, burst=burst)
    for gap in gaps:
        clock.now += gap
        wait_s = waits(allowed)
        if wait_s:
            clock.now += wait_s
            assert waits(allowed) == 0


@given(
    rate=st.floats(0.01, 10),
    burst=st.integers(1, 20),
    gaps=st.lists(st.floats(0, 5), min_size=1, max_size=60),
)
def test_no_more_than_burst_and_rate_allow_are_ever_let_in(rate: float, burst: int, gaps: list[float]) -> None:
    clock = Clock(50.0)
    allowed = allowance(clock, requests_per_s=rate, burst=burst)
    let_in = 0
    for gap in gaps:
        clock.now += gap
        let_in += waits(allowed) == 0
    assert let_in <= burst + rate * sum(gaps) + 1e-6


@pytest.mark.parametrize("accounts", [("key a", "address 1"), ("key a", "address 2"), ("key b", "address 1")])
async def test_unknown_ids_are_counted_by_key_and_by_address(accounts: tuple[str, ...]) -> None:
    clock = Clock(0.0)
    limit = UnknownIdLimit(3, clock=clock, sleep=at_once)

    async def look_up(error: Exception | None) -> None:
        async with limit.counting():
            if error is not None:
                raise error

    asked_by.set(("key a", "address 1"))
    for error in (
        None,
        RankTooHigh("a/b", "it exists"),
        ModelNotFound("x"),
        HubUnavailable("x", "y"),
        AccessDenied("x"),
    ):
        with contextlib.suppress(LoraplexError):
            await look_up(error)
    asked_by.set(accounts)
    with pytest.raises(UnknownIdLimitReached) as caught:
        await look_up(None)
    assert caught.value.retry_after_s == 20
    asked_by.set(("key c", "address 3"))
    await look_up(None)
    asked_by.set(accounts)
    clock.now += 20
    await look_up(None)


async def test_refusals_of_unknown_ids_are_delayed_and_only_a_few_at_a_time() -> None:
    hold, delays = asyncio.Event(), list[float]()

    async def sleep(seconds: float) -> None:
        delays.append(seconds)
        await hold.wait()

    limit = UnknownIdLimit(1, clock=Clock(0.0), sleep=sleep)

    async def look_up() -> None:
        async with limit.counting():
            raise ModelNotFound("x")

    asked_by.set(("address 1",))
    with pytest.raises(ModelNotFound):
        await look_up()
    asking = [asyncio.create_task(look_up()) for _ in range(MAX_DELAYED_REFUSALS + 3)]
    done, waiting = await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
    assert len(done) == 3
    waiting.pop().cancel()
    await asyncio.sleep(0)
    asking.append(asyncio.create_task(look_up()))
    await asyncio.sleep(0)
    assert delays == [REFUSAL_DELAY_S] * (MAX_DELAYED_REFUSALS + 1)
    hold.set()
    errors = await asyncio.gather(*asking, return_exceptions=True)
    assert sum(isinstance(error, UnknownIdLimitReached) for error in errors) == len(asking) - 1


async def at_once(_: float) -> None:
    pass


def test_addresses_of_one_network_are_one_account() -> None:
    def accounts(host: str, key: str | None = None) -> tuple[str, ...]:
        return accounts_of({"client": (host, 5)}, key)

    assert accounts("2001:db8:1:2::7") == accounts("2001:db8:1:2:9:9:9:9") != accounts("2001:db8:1:3::7")
    assert accounts("10.0.0.1", "alice") == ("key alice", "address 10.0.0.1")
    assert accounts_of({}, None) == ()
