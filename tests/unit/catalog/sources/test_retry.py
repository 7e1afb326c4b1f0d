from __future__ import annotations

import itertools
import random

import pytest

from serve_app.catalog.sources.hub_errors import HubRetryAfter, NonRetryableHubError
from serve_app.catalog.sources.remote_calls import RemoteCalls
from serve_app.catalog.sources.retry import RetryPolicy
from serve_app.errors import AccessDenied, HubUnavailable, LoraplexError
from tests.clock import Clock

PAUSES = RetryPolicy(tries=4, first_s=1.0, longest_s=3.0)


def failing(errors: list[LoraplexError]):
    def call() -> str:
        if errors:
            raise errors.pop(0)
        return "answer"

    return call


class Questions:
    """Questions to a Hub, in a time that passes by pauses alone."""

    def __init__(self) -> None:
        self.clock = Clock(now=0.0)
        self.pauses: list[float] = []
        self.calls = RemoteCalls(clock=self.clock, sleep=self._sleep, chance=lambda: 1.0)

    def _sleep(self, pause_s: float) -> None:
        self.pauses.append(pause_s)
        self.clock.now += pause_s

    def ask(self, *errors: LoraplexError, until: float = 100.0) -> str:
        return self.calls.retry(failing(list(errors)), "me/sketch", None, until, PAUSES)


def away(count: int = 1) -> list[LoraplexError]:
    return [HubUnavailable("me/sketch", "the Hub cannot be reached") for _ in range(count)]


def test_pauses_grow_up_to_a_bound_and_then_the_failure_is_told() -> None:
    asked = Questions()
    assert asked.ask(*away(3)) == "answer"
    assert asked.pauses == [1.0, 2.0, 3.0]
    with pytest.raises(HubUnavailable, match="cannot be reached"):
        asked.ask(*away(4))


def test_those_who_failed_together_do_not_ask_again_together() -> None:
    chance = random.Random(5).random
    drawn = {PAUSES.next_delay_s(away()[0], tries_made=1, left_s=9.0, chance=chance) for _ in range(50)}
    assert len(drawn) == 50
    assert all(pause is not None and 0.5 <= pause <= 1.0 for pause in drawn)


def test_no_pause_outlasts_the_time_that_is_left() -> None:
    asked = Questions()
    with pytest.raises(HubUnavailable):
        asked.ask(*away(9), until=2.5)
    assert asked.clock.now < 2.5


@pytest.mark.parametrize(
    "error", [AccessDenied("me/sketch"), NonRetryableHubError("me/sketch", "the service is set to work offline")]
)
def test_what_would_be_the_same_again_is_not_asked_again(error: LoraplexError) -> None:
    asked = Questions()
    with pytest.raises(type(error)):
        asked.ask(error)
    assert asked.pauses == []


def test_a_pause_that_the_hub_asked_for_is_kept_and_one_too_long_is_told() -> None:
    asked = Questions()
    assert asked.ask(HubRetryAfter("me/sketch", "the Hub answered with status 503", 2)) == "answer"
    assert asked.pauses == [3.0]
    with pytest.raises(HubUnavailable, match="try again in 4 s"):
        asked.ask(HubRetryAfter("me/sketch", "the Hub answered with status 503", 4))


def test_while_the_hub_limits_requests_none_is_sent_and_afterwards_they_are_again() -> None:
    asked = Questions()
    with pytest.raises(HubUnavailable):
        asked.ask(HubRetryAfter("me/sketch", "the Hub is limiting requests", 30, is_limiting=True))
    asked.clock.now += 10.0
    with pytest.raises(HubUnavailable, match="limiting requests; try again in 20 s"):
        asked.ask()
    asked.clock.now += 20.0
    assert asked.ask() == "answer"


def test_tries_are_counted_from_the_last_progress() -> None:
    asked = Questions()
    arrived = itertools.count()
    with pytest.raises(HubUnavailable):
        asked.calls.retry(failing(away(99)), "me/sketch", None, 50.0, PAUSES, lambda: next(arrived))
    assert len(asked.pauses) > 10
