from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from serve_app.catalog.resolving.lookups import MAX_FAILURES, CachePolicy, SingleFlightCache
from serve_app.catalog.sources.hub_errors import HubRetryAfter
from serve_app.errors import HubUnavailable, LoraplexError, ModelNotFound
from tests.clock import Clock


class Source:
    """Counts how often it is asked, answers once it is let, and fails where it is told to."""

    def __init__(self) -> None:
        self.asked = 0
        self.failure: LoraplexError | None = None
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def __call__(self, key: str) -> str:
        self.asked += 1
        answer = f"{key} {self.asked}"
        failure = self.failure
        await self.may_answer.wait()
        if failure is not None:
            raise failure
        return answer


class Known(SingleFlightCache[str, str]):
    """A cache in front of one source."""

    def __init__(self, source: Callable[[str], Awaitable[str]], clock: Clock, **options: Any) -> None:
        super().__init__(CachePolicy(lambda _: 60.0, 5.0, **options), clock=clock)
        self._source = source

    async def get(self, key: str) -> str:  # type: ignore[override]
        return await super().get(key, lambda: self._source(key))


async def test_a_value_is_asked_for_once_within_its_time():
    source, clock = Source(), Clock(1000.0)
    known = Known(source, clock)
    assert await known.get("k") == await known.get("k") == "k 1"
    clock.now += 61
    assert await known.get("k") == "k 2"


async def test_a_failure_is_kept_for_its_own_shorter_time():
    source, clock = Source(), Clock(1000.0)
    source.failure = ModelNotFound("k")
    known = Known(source, clock)
    for _ in range(3):
        with pytest.raises(ModelNotFound):
            await known.get("k")
    assert source.asked == 1
    source.failure = None
    clock.now += 6
    assert await known.get("k") == "k 2"


async def test_those_who_ask_together_share_one_look_up_and_those_who_leave_hurt_nobody():
    source = Source()
    source.may_answer.clear()
    known = Known(source, Clock(1000.0))
    askers = [asyncio.create_task(known.get("k")) for _ in range(20)]
    await asyncio.sleep(0)
    for leaver in askers[:5]:
        leaver.cancel()
    await asyncio.gather(*askers[:5], return_exceptions=True)
    source.may_answer.set()
    assert await asyncio.gather(*askers[5:]) == ["k 1"] * 15
    assert source.asked == 1


async def test_a_look_up_goes_on_when_everybody_left():
    source = Source()
    source.may_answer.clear()
    known = Known(source, Clock(1000.0))
    asker = asyncio.create_task(known.get("k"))
    await asyncio.sleep(0)
    asker.cancel()
    await asyncio.gather(asker, return_exceptions=True)
    source.may_answer.set()
    assert await known.get("k") == "k 1"
    assert source.asked == 1


async def test_an_old_value_stays_while_the_source_is_away_and_goes_when_it_says_no():
    source, clock = Source(), Clock(1000.0)
    known = Known(source, clock)
    await known.get("k")
    clock.now += 61
    source.failure = HubUnavailable("k", "down")
    assert await known.get("k") == "k 1"
    assert await known.get("k") == "k 1"
    assert source.asked == 2, "a source that is away is not asked again at once"
    clock.now += 6
    source.failure = ModelNotFound("k")
    with pytest.raises(ModelNotFound):
        await known.get("k")


async def test_a_slow_renewal_is_not_waited_for():
    source, clock = Source(), Clock(1000.0)
    known = Known(source, clock, grace_s=0.01)
    await known.get("k")
    clock.now += 61
    source.may_answer.clear()
    assert await known.get("k") == "k 1"
    assert await known.get("k") == "k 1"
    assert source.asked == 2
    source.may_answer.set()
    for _ in range(5):
        await asyncio.sleep(0)
    assert await known.get("k") == "k 2"


async def test_a_failure_that_is_raised_often_gathers_no_tracebacks():
    source = Source()
    source.failure = ModelNotFound("k")
    known = Known(source, Clock(1000.0))
    depths = []
    for _ in range(3):
        with pytest.raises(ModelNotFound) as raised:
            await known.get("k")
        depths.append(len(raised.traceback))
    assert depths[1] == depths[2]


async def test_the_least_recently_asked_is_forgotten_over_the_limit():
    source = Source()
    known = Known(source, Clock(1000.0), max_entries=2)
    for key in ("a", "b", "a", "c"):
        await known.get(key)
    assert sorted(known.values()) == ["a 1", "c 3"]


async def test_a_flood_of_unknown_names_evicts_no_answer_and_is_itself_bounded():
    source = Source()
    known = Known(source, Clock(1000.0), max_entries=3)
    await known.get("good")
    source.failure = ModelNotFound("k")
    for index in range(10):
        with pytest.raises(ModelNotFound):
            await known.get(f"unknown{index}")
    asked = source.asked
    assert await known.get("good") == "good 1"
    assert source.asked == asked
    assert len(known._failures) == 3


async def test_a_failure_is_kept_for_as_long_as_the_hub_asked_and_says_how_much_is_left():
    source, clock = Source(), Clock(1000.0)
    source.failure = HubRetryAfter("k", "the Hub is limiting requests", 60)
    known = Known(source, clock)
    for passed_s in (0, 20):
        clock.now += passed_s
        with pytest.raises(HubUnavailable) as raised:
            await known.get("k")
        assert raised.value.retry_after_s == 60 - passed_s
    assert source.asked == 1


async def test_without_grace_no_expired_value_is_used():
    source, clock = Source(), Clock(1000.0)
    known = Known(source, clock, grace_s=None)
    await known.get("k")
    clock.now += 60
    source.failure = HubUnavailable("k", "down")
    with pytest.raises(HubUnavailable):
        await known.get("k")
    assert list(known.values()) == []


async def test_a_value_that_replaces_a_failure_is_used():
    source, clock = Source(), Clock(1000.0)
    source.failure = ModelNotFound("k")
    known = Known(source, clock)
    with pytest.raises(ModelNotFound):
        await known.get("k")
    source.failure = None
    clock.now += 5
    assert await known.get("k") == await known.get("k") == "k 2"
    assert not known._failures


async def test_a_remembered_failure_keeps_nothing_alive_of_what_led_to_it():
    class Answer:
        """What the Hub's client would have held when it gave up."""

    held: list[weakref.ref[Answer]] = []

    async def look_up(key: str) -> str:
        answer = Answer()
        held.append(weakref.ref(answer))
        try:
            raise OSError("broken off")
        except OSError:
            raise HubUnavailable(key, "the Hub broke off") from None

    known = Known(look_up, Clock(1000.0))
    with pytest.raises(HubUnavailable):
        await known.get("k")
    gc.collect()
    assert held[0]() is None


async def test_failures_drive_out_no_value_and_leave_when_their_time_is_over():
    source, clock = Source(), Clock(1000.0)
    known = Known(source, clock)
    await known.get("good")
    source.failure = ModelNotFound("k")
    for index in range(MAX_FAILURES + 50):
        with pytest.raises(ModelNotFound):
            await known.get(f"bad {index}")
    assert len(known._failures) == MAX_FAILURES
    assert (known.knows("good"), known.knows("bad 0"), known.knows(f"bad {MAX_FAILURES}")) == (True, False, True)
    assert await known.get("good") == "good 1"
    clock.now += 6
    with pytest.raises(ModelNotFound):
        await known.get("bad again")
    assert list(known._failures) == ["bad again"]
