"""How far the order of arrival may be broken, as properties over whole histories of a queue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.core import Priority
from serve_app.engine.worker.scheduling import (
    AdapterSetKey,
    BatchKey,
    QueuedRequest,
    QueuePolicy,
    batch_key,
    in_order,
    next_batch,
    remaining_after,
    unmeetable_deadlines,
)
from serve_app.work import LatencyModel
from tests.engine_cases import request

HOT: AdapterSetKey = (("hot", 1.0),)
COLD: AdapterSetKey = (("cold", 1.0),)
COMPOSITIONS: tuple[AdapterSetKey, ...] = ((), HOT, COLD)


def key(composition: AdapterSetKey, steps: int = 3) -> BatchKey:
    return batch_key(request(steps=steps), composition)


@dataclass(frozen=True)
class Arrival:
    """One request of a history: how long after the one before it came, and what it is."""

    gap_s: float
    composition: AdapterSetKey
    priority: Priority
    steps: int
    num_images: int


@dataclass
class History:
    """A queue in simulated time: every pass takes `pass_s`, and every pass begun is noted."""

    policy: QueuePolicy
    max_images: int
    pass_s: float
    now_s: float = 0.0
    passes: list[tuple[float, tuple[QueuedRequest, ...], list[QueuedRequest]]] = field(default_factory=list)

    def run(self, arrivals: Sequence[Arrival]) -> None:
        times: list[float] = []
        for arrival in arrivals:
            times.append((times[-1] if times else 0.0) + arrival.gap_s)
        pending_fetches = [
            QueuedRequest(job_id, key(each.composition, each.steps), each.num_images, at, priority=each.priority)
            for job_id, (each, at) in enumerate(zip(arrivals, times, strict=True))
        ]
        waiting: list[QueuedRequest] = []
        applied: AdapterSetKey = ()
        while pending_fetches or waiting:
            if not waiting:
                self.now_s = max(self.now_s, pending_fetches[0].arrived_s)
            while pending_fetches and pending_fetches[0].arrived_s <= self.now_s:
                waiting.append(pending_fetches.pop(0))
            batch = next_batch(
                waiting, applied=applied, now_s=self.now_s, policy=self.policy, max_images=self.max_images
            )
            assert batch is not None, "the device idles although somebody waits"
            ran = {item.job_id: item for item in waiting if item.job_id in batch.tickets}
            left = remaining_after(waiting, batch, now_s=self.now_s, policy=self.policy)
            assert sorted([*ran, *(item.job_id for item in left)]) == sorted(item.job_id for item in waiting)
            self.passes.append((self.now_s, tuple(ran[job_id] for job_id in batch.tickets), waiting))
            waiting, applied = left, batch.key.composition
            self.now_s += self.pass_s


arrivals = st.lists(
    st.builds(
        Arrival,
        gap_s=st.sampled_from((0.0, 0.1, 1.0, 3.0)),
        composition=st.sampled_from((*COMPOSITIONS, HOT, HOT, HOT)),
        priority=st.sampled_from(("interactive", "interactive", "batch")),
        steps=st.sampled_from((1, 2)),
        num_images=st.integers(1, 3),
    ),
    min_size=1,
    max_size=30,
)
policies = st.builds(
    QueuePolicy,
    max_overtakes=st.integers(0, 4),
    max_overtaken_s=st.sampled_from((0.0, 2.0, 5.0)),
    batch_delay_s=st.sampled_from((0.0, 3.0, 10.0)),
)
histories = st.builds(History, policies, max_images=st.integers(1, 4), pass_s=st.sampled_from((0.2, 1.0, 4.0)))


@given(histories, arrivals)
@settings(max_examples=150, deadline=None)
def test_nobody_is_overtaken_more_often_or_longer_than_the_policy_allows(
    history: History, arrivals: list[Arrival]
) -> None:
    history.run(arrivals)
    policy = history.policy
    overtakes: dict[int, list[float]] = {}
    for now_s, batch, waited in history.passes:
        # Counted here from the arrivals alone, not from what the queue noted.
        order = [item.job_id for item in in_order(waited, policy)]
        for job_id in order[: order.index(batch[0].job_id)]:
            if job_id not in {item.job_id for item in batch}:
                overtakes.setdefault(job_id, []).append(now_s)
    for times in overtakes.values():
        assert len(times) <= policy.max_overtakes
        assert times[-1] == times[0] or times[-1] - times[0] < policy.max_overtaken_s


@given(histories, arrivals)
@settings(max_examples=150, deadline=None)
def test_a_request_waits_for_those_before_it_and_for_its_overtakers_alone(
    history: History, arrivals: list[Arrival]
) -> None:
    history.run(arrivals)
    starts = {item.job_id: now_s for now_s, batch, _ in history.passes for item in batch}
    for now_s, batch, _ in history.passes:
        for item in batch:
            delay_s = history.policy.batch_delay_s if item.priority == "batch" else 0.0
            before = [
                other
                for other in range(len(arrivals))
                if other != item.job_id and _arrived(arrivals, other) <= item.arrived_s + delay_s
            ]
            passes_before = len(before) + history.policy.max_overtakes + 1
            assert starts[item.job_id] - item.arrived_s <= passes_before * history.pass_s + 1e-9, now_s


def _arrived(arrivals: Sequence[Arrival], index: int) -> float:
    return sum(each.gap_s for each in arrivals[: index + 1])


@given(st.integers(0, 4), st.sampled_from((1.0, 5.0, 30.0)))
@settings(deadline=None)
def test_a_stream_that_is_nine_tenths_one_adapter_delays_no_other_beyond_the_bound(k: int, seconds: float) -> None:
    history = History(QueuePolicy(max_overtakes=k, max_overtaken_s=seconds), max_images=1, pass_s=1.0)
    stream = [
        Arrival(1.0, COLD if index % 10 == 5 else HOT, "interactive", steps=3, num_images=1) for index in range(200)
    ]
    backlog = [replace(stream[0], gap_s=0.0)] * 5
    history.run([*backlog, *stream])
    waits = [
        (now_s - batch[0].arrived_s, len([item for item in waited if item.job_id < batch[0].job_id]))
        for now_s, batch, waited in history.passes
    ]
    assert max(wait_s for wait_s, _ in waits) <= len(backlog) + k + 2


def test_under_interactive_load_without_end_a_batch_request_still_has_its_turn() -> None:
    history = History(QueuePolicy(batch_delay_s=20.0), max_images=1, pass_s=1.0)
    stream = [Arrival(0.5, HOT, "batch" if index == 10 else "interactive", 3, 1) for index in range(300)]
    history.run(stream)
    began_s = next(now_s for now_s, batch, _ in history.passes if batch[0].priority == "batch")
    # Twice as much comes as can be done: those within 20 s of it are 40 passes, those before it 10.
    assert began_s <= 5 + 20 + 10 + 40 + 1


def test_interactive_requests_go_before_a_batch_request_that_came_first() -> None:
    first = QueuedRequest(0, key(HOT), 1, 0.0, priority="batch")
    second = QueuedRequest(1, key(COLD), 1, 1.0)
    assert [item.job_id for item in in_order((first, second), QueuePolicy())] == [1, 0]


def test_what_is_applied_already_goes_first() -> None:
    policy = QueuePolicy(max_overtakes=1)
    waiting = [QueuedRequest(0, key(COLD), 1), QueuedRequest(1, key(HOT), 1), QueuedRequest(2, key(HOT, 2), 1)]
    batch = next_batch(waiting, applied=HOT, now_s=0.0, policy=policy, max_images=4)
    assert batch is not None
    assert batch.tickets == (1,)
    left = remaining_after(waiting, batch, now_s=0.0, policy=policy)
    assert [(item.job_id, item.times_skipped) for item in left] == [(0, 1), (2, 0)]
    batch = next_batch(left, applied=HOT, now_s=1.0, policy=policy, max_images=4)
    assert batch is not None
    assert batch.tickets == (0,)


def test_who_was_overtaken_for_long_enough_is_not_overtaken_again() -> None:
    waiting = [QueuedRequest(0, key(COLD), 1, times_skipped=1, overtaken_since_s=10.0), QueuedRequest(1, key(HOT), 1)]

    def first_at(now_s: float) -> int:
        batch = next_batch(waiting, applied=HOT, now_s=now_s, policy=QueuePolicy(max_overtaken_s=5.0), max_images=1)
        assert batch is not None
        return batch.tickets[0]

    assert [first_at(14.9), first_at(15.0)] == [1, 0]


def test_a_request_is_given_up_when_its_deadline_has_passed_or_is_out_of_reach() -> None:
    pace = LatencyModel(fixed_s=1.0, unit_s=1.0)
    late = QueuedRequest(0, key(()), 1, deadline_s=10.0, units=1.0)
    too_much = QueuedRequest(1, key(()), 1, deadline_s=14.0, units=9.0)
    in_time = QueuedRequest(2, key(()), 1, deadline_s=14.0, units=5.0)
    endless = QueuedRequest(3, key(()), 1, units=1e9)
    queue = (late, too_much, in_time, endless)
    assert unmeetable_deadlines(queue, now_s=10.0, pace=pace) == (0, 1)
    assert unmeetable_deadlines(queue, now_s=10.0, pace=None) == (0,)


def test_a_request_that_waits_alone_is_tried_whatever_the_pace_says() -> None:
    item = QueuedRequest(0, key(()), 1, deadline_s=10.0, units=1e9)
    assert unmeetable_deadlines([item], now_s=9.0, pace=LatencyModel(1.0, 1.0)) == ()
