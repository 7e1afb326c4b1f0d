"""The books of keys with limits, told by messages that come late, in any order, or never."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.config import KeyLimits
from serve_app.deployments.limits.lease_table import Heartbeat, LeaseTable, RequestLease
from serve_app.errors import KeyLimitReached, OutOfBounds

PATIENCE_S = 5.0


class Clock:
    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def books(clock: Clock) -> LeaseTable:
    return LeaseTable(clock=clock, patience_s=PATIENCE_S)


def lease(number: int, **limits: float) -> RequestLease:
    return RequestLease(number, "alice", KeyLimits.model_validate(limits))


def beat(holder: str, last_issued: int, *held: RequestLease, asked: tuple[int, ...] = ()) -> Heartbeat:
    return Heartbeat(holder, last_issued, held, frozenset(asked))


def test_a_limit_holds_over_all_holders_together(books: LeaseTable) -> None:
    assert books.begin("a", lease(1, concurrency=2)) is None
    assert books.begin("b", lease(1, concurrency=2)) is None
    for holder in ("a", "b"):
        refusal = books.begin(holder, lease(2, concurrency=2))
        assert isinstance(refusal, KeyLimitReached)
        assert "2 requests at once" in str(refusal)
    books.end("a", 1, drew=True)
    assert books.begin("b", lease(3, concurrency=2)) is None


def test_a_rate_holds_over_all_holders_together(books: LeaseTable, clock: Clock) -> None:
    def let_in(holder: str, number: int) -> bool:
        return books.begin(holder, lease(number, requests_per_s=1, burst=3)) is None

    assert [let_in(holder, 1) for holder in "abcd"] == [True, True, True, False]
    clock.now += 1
    assert [let_in(holder, 2) for holder in "abcd"] == [True, False, False, False]


def test_images_are_counted_together_and_come_back_where_none_were_drawn(books: LeaseTable) -> None:
    limits = {"images_per_minute": 6}
    for holder in ("a", "b"):
        assert books.begin(holder, lease(1, **limits)) is None
        assert books.spend(holder, lease(1, **limits), 3) is None
    assert books.begin("a", lease(2, **limits)) is None
    assert isinstance(books.spend("a", lease(2, **limits), 1), KeyLimitReached)
    books.end("b", 1, drew=False)
    assert books.spend("a", lease(2, **limits), 3) is None
    assert isinstance(books.spend("a", lease(2, **limits), 7), OutOfBounds)


def test_what_a_dead_holder_had_comes_back_after_its_patience_and_no_sooner(books: LeaseTable, clock: Clock) -> None:
    assert books.begin("dead", lease(1, concurrency=1)) is None
    clock.now += PATIENCE_S
    assert isinstance(books.begin("b", lease(1, concurrency=1)), KeyLimitReached)
    clock.now += 0.1
    assert books.begin("b", lease(2, concurrency=1)) is None


def test_a_heartbeat_keeps_what_a_holder_has(books: LeaseTable, clock: Clock) -> None:
    held = lease(1, concurrency=1)
    assert books.begin("a", held) is None
    for _ in range(10):
        clock.now += PATIENCE_S - 1
        books.apply_heartbeat(beat("a", 1, held))
        assert isinstance(books.begin("b", lease(1, concurrency=1)), KeyLimitReached)


def test_new_books_learn_from_heartbeats_what_is_under_way(books: LeaseTable) -> None:
    books.apply_heartbeat(beat("a", 7, lease(3, concurrency=2), lease(7, concurrency=2)))
    assert isinstance(books.begin("b", lease(1, concurrency=2)), KeyLimitReached)
    books.end("a", 3, drew=True)
    assert books.begin("b", lease(2, concurrency=2)) is None


def test_an_end_that_was_lost_is_made_good_by_the_next_heartbeat(books: LeaseTable) -> None:
    assert books.begin("a", lease(1, concurrency=1)) is None
    books.apply_heartbeat(beat("a", 1))
    assert books.begin("b", lease(1, concurrency=1)) is None


def test_a_heartbeat_that_is_older_than_a_request_does_not_end_it(books: LeaseTable) -> None:
    assert books.begin("a", lease(2, concurrency=1)) is None
    books.apply_heartbeat(beat("a", 1))
    books.apply_heartbeat(beat("a", 2, asked=(2,)))
    assert isinstance(books.begin("b", lease(1, concurrency=1)), KeyLimitReached)


def test_a_request_whose_end_comes_first_takes_nothing(books: LeaseTable) -> None:
    books.end("a", 1, drew=False)
    assert books.begin("a", lease(1, concurrency=1)) is None
    assert books.under_way == 0


def test_a_heartbeat_that_is_older_than_an_end_does_not_bring_it_back(books: LeaseTable) -> None:
    held = lease(1, concurrency=1)
    assert books.begin("a", held) is None
    books.end("a", 1, drew=True)
    books.apply_heartbeat(beat("a", 1, held))
    assert books.under_way == 0


@dataclass
class Ingress:
    """A holder that does everything right, over a network that does not."""

    name: str
    books: LeaseTable
    last: int = 0
    held: dict[int, RequestLease] = field(default_factory=dict[int, RequestLease])

    def messages(self, kinds: list[str], limits: KeyLimits) -> list[Callable[[], object]]:
        """What it sends for requests that begin and end, in the order in which it sends them."""
        sent: list[Callable[[], object]] = []
        for kind in kinds:
            if kind == "begin":
                self.last += 1
                new = RequestLease(self.last, "alice", limits)
                self.held[self.last] = new
                sent.append(partial(self.books.begin, self.name, new))
            elif kind == "end" and self.held:
                number = next(iter(self.held))
                del self.held[number]
                sent.append(partial(self.books.end, self.name, number, drew=True))
            elif kind == "beat":
                sent.append(partial(self.books.apply_heartbeat, self.beat()))
        return sent

    def beat(self) -> Heartbeat:
        return Heartbeat(self.name, self.last, tuple(self.held.values()), frozenset())


KINDS = st.lists(st.sampled_from(["begin", "end", "beat"]), max_size=12)


@given(a=KINDS, b=KINDS, shuffle=st.randoms(use_true_random=False), lost=st.sets(st.integers(0, 23)))
def test_whatever_is_lost_or_late_the_books_are_right_after_a_heartbeat(
    a: list[str], b: list[str], shuffle: random.Random, lost: set[int]
) -> None:
    books = LeaseTable(clock=Clock(), patience_s=PATIENCE_S)
    limits = KeyLimits(concurrency=100)
    ingresses = [Ingress("a", books), Ingress("b", books)]
    messages = ingresses[0].messages(a, limits) + ingresses[1].messages(b, limits)
    shuffle.shuffle(messages)
    for index, message in enumerate(messages):
        if index not in lost:
            message()
    for one in ingresses:
        books.apply_heartbeat(one.beat())
    truly = sum(len(one.held) for one in ingresses)
    assert books.under_way == truly
    fresh = [books.begin("c", RequestLease(number, "alice", limits)) for number in range(1, 102 - truly)]
    assert [refusal is None for refusal in fresh] == [True] * (100 - truly) + [False]


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["begin", "end", "beat", "wait", "die"]), st.integers(0, 2), st.floats(0.1, 2.0)),
    max_size=60,
)


@given(operations=OPERATIONS, limit=st.integers(1, 4))
def test_no_more_than_the_limit_are_ever_under_way_at_holders_that_live(
    operations: list[tuple[str, int, float]], limit: int
) -> None:
    clock = Clock()
    books = LeaseTable(clock=clock, patience_s=PATIENCE_S)
    limits = KeyLimits(concurrency=limit)
    ingresses = [Ingress(str(index), books) for index in range(3)]
    for kind, index, gap_s in operations:
        one = ingresses[index]
        if kind == "begin":
            one.last += 1
            asked = RequestLease(one.last, "alice", limits)
            if books.begin(one.name, asked) is None:
                one.held[one.last] = asked
        elif kind == "end" and one.held:
            number, _ = one.held.popitem()
            books.end(one.name, number, drew=True)
        elif kind == "die":
            # What it had is over; its successor is another holder.
            ingresses[index] = Ingress(one.name + "'", books)
        elif kind == "wait":
            clock.now += gap_s
            for living in ingresses:
                books.apply_heartbeat(living.beat())
        assert sum(len(living.held) for living in ingresses) <= limit
    for living in ingresses:
        for number in living.held:
            books.end(living.name, number, drew=True)
        living.held.clear()
    clock.now += PATIENCE_S + 1
    assert [books.begin("z", RequestLease(number, "alice", limits)) is None for number in range(1, limit + 2)] == [
        True
    ] * limit + [False]
