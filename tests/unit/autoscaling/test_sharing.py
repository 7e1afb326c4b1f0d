"""Who has the GPUs where bases want more than there are."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.autoscaling.sharing import (
    STAY_STARTS,
    BaseNeed,
    History,
    LongestWait,
    Share,
    longest_wait,
    share_gpus,
)

NOW_S = 10_000.0
# Came long ago, has work for one replica.
BUSY = BaseNeed(1.0, present=1, needed=1, wanted=1, work_s=10.0, start_s=5.0, came_s=0.0)
# Nobody asks for it any more; its own delay would keep it.
IDLE = replace(BUSY, needed=0, wanted=0, work_s=0.0, quiet_s=NOW_S - 60)
FRESH = replace(BUSY, came_s=NOW_S - 1)
WAITING = BaseNeed(1.0, wanted=1, waits_s=NOW_S)


def shares(gpus: float, **bases: BaseNeed) -> dict[str, tuple[int, bool]]:
    return {key: (one.replicas, one.is_taken) for key, one in share_gpus(bases, gpus, NOW_S).items()}


def test_with_enough_gpus_each_base_has_what_it_wants_by_itself() -> None:
    bases = {"a": replace(BUSY, needed=3, wanted=3), "b": IDLE, "c": WAITING}
    assert share_gpus(bases, 5, NOW_S) == {"a": Share(3), "b": Share(0), "c": Share(1)}


def test_a_waiting_base_takes_the_place_of_an_idle_one_at_once() -> None:
    assert shares(2, a=BUSY, b=IDLE, c=WAITING) == {"a": (1, False), "b": (0, True), "c": (1, False)}


def test_of_idle_bases_the_one_that_was_asked_for_last_stays() -> None:
    found = shares(2, a=replace(IDLE, quiet_s=NOW_S - 30), b=replace(IDLE, quiet_s=NOW_S - 20), c=WAITING)
    assert found["a"] == (0, True)
    assert not found["b"][1]


def test_where_none_is_idle_the_least_busy_by_weight_gives_way() -> None:
    light, heavy = replace(BUSY, work_s=30.0), replace(BUSY, work_s=20.0, weight=2.0)
    assert shares(2, a=light, b=heavy, c=WAITING)["a"] == (0, True)
    assert shares(2, a=light, b=replace(heavy, weight=1.0), c=WAITING)["b"] == (0, True)


def test_a_further_replica_goes_before_a_base_loses_its_last() -> None:
    found = shares(3, a=replace(BUSY, present=2, needed=2, wanted=2, work_s=500.0), b=BUSY, c=WAITING)
    assert found == {"a": (1, True), "b": (1, False), "c": (1, False)}


def test_a_base_that_came_stays_for_a_multiple_of_its_start_unless_nobody_asks_for_it() -> None:
    assert shares(1, a=FRESH, b=WAITING) == {"a": (1, False), "b": (0, False)}
    assert shares(1, a=replace(FRESH, came_s=NOW_S - STAY_STARTS * 5.0), b=WAITING)["a"] == (0, True)
    quiet = replace(IDLE, came_s=NOW_S - 6)
    assert shares(1, a=replace(quiet, quiet_s=NOW_S - 4), b=WAITING)["a"] == (0, False)
    assert shares(1, a=replace(quiet, quiet_s=NOW_S - 5), b=WAITING)["a"] == (0, True)


def test_what_is_guaranteed_is_never_taken() -> None:
    assert shares(1, a=replace(IDLE, least=1, wanted=1), b=WAITING) == {"a": (1, False), "b": (0, False)}


def test_a_replica_moves_only_where_there_is_much_more_work_for_it() -> None:
    many = replace(BUSY, present=3, needed=3, wanted=3, work_s=60.0)
    assert shares(4, a=many, b=replace(BUSY, needed=3, wanted=3, work_s=60.0))["b"] == (1, False)
    found = shares(4, a=many, b=replace(BUSY, needed=3, wanted=3, work_s=100.0))
    assert found == {"a": (2, True), "b": (2, False)}


def test_a_base_that_is_just_starting_keeps_its_place() -> None:
    assert shares(1, a=replace(BUSY, is_fixed=True), b=WAITING) == {"a": (1, False), "b": (0, False)}


def test_who_has_waited_longest_comes_first() -> None:
    found = shares(1, a=IDLE, b=WAITING, c=replace(WAITING, waits_s=NOW_S - 1))
    assert found == {"a": (0, True), "b": (0, False), "c": (1, False)}


def test_fractions_of_gpus_are_added_up() -> None:
    half = replace(IDLE, gpus=0.5)
    found = shares(1, a=half, b=replace(half, quiet_s=NOW_S - 20), c=replace(WAITING, gpus=0.5))
    assert found == {"a": (0, True), "b": (0, False), "c": (1, False)}


def test_when_a_base_came_and_grew_is_remembered() -> None:
    history = History()
    for now_s, running, is_quiet in ((1.0, 0, False), (2.0, 1, False), (3.0, 2, False), (4.0, 2, True), (5.0, 1, True)):
        history.see(running, is_quiet=is_quiet, now_s=now_s)
    assert (history.came_s, history.grew_s, history.quiet_s) == (2.0, 3.0, 4.0)
    history.see(0, is_quiet=True, now_s=6.0)
    assert (history.came_s, history.grew_s) == (None, None)


times = st.none() | st.floats(0, NOW_S)
needs = st.builds(
    BaseNeed,
    gpus=st.sampled_from([0.25, 0.5, 1.0, 2.0]),
    weight=st.sampled_from([0.5, 1.0, 4.0]),
    present=st.integers(0, 4),
    needed=st.integers(0, 6),
    wanted=st.integers(0, 6),
    work_s=st.floats(0, 1e4),
    start_s=st.floats(0.1, 300),
    came_s=times,
    grew_s=times,
    quiet_s=times,
) | st.builds(BaseNeed, gpus=st.sampled_from([0.5, 1.0]), wanted=st.just(1), waits_s=st.floats(0, NOW_S))


@given(st.lists(needs, min_size=1, max_size=8), st.integers(1, 12), st.data())
def test_the_sum_never_exceeds_the_gpus_and_minima_hold(bases: list[BaseNeed], gpus: int, data: st.DataObject) -> None:
    room = float(gpus)
    listed: dict[int, BaseNeed] = {}
    for key, base in enumerate(bases):
        least = data.draw(st.integers(0, min(base.replicas, int(room / base.gpus))))
        room -= least * base.gpus
        listed[key] = replace(base, least=least, wanted=max(base.wanted, least))
    found = share_gpus(listed, gpus, NOW_S)
    assert sum(listed[key].gpus * share.replicas for key, share in found.items()) <= gpus + 1e-3
    for key, share in found.items():
        base = listed[key]
        assert share.replicas >= base.least
        assert share.is_taken == (
            base.waits_s is None and share.replicas < base.present and share != Share(base.wanted)
        )


@pytest.mark.parametrize(
    ("bases", "gpus", "wait"),
    [
        ([(0, 1.0)] * 8, 4, LongestWait(6, 2)),
        ([(0, 1.0)] * 9, 4, LongestWait(11, 3)),
        ([(0, 1.0)] * 4, 4, LongestWait(1, 1)),
        ([(1, 1.0), *[(0, 1.0)] * 4], 2, LongestWait(16, 4)),
        ([(0, 0.5)] * 8, 2, LongestWait(6, 2)),
        ([(1, 1.0), (0, 1.0)], 1, None),
        ([(2, 1.0)], 2, LongestWait(0, 0)),
        ([(0, 0.0)], 0, LongestWait(0, 0)),
    ],
)
def test_the_longest_wait_is_told(bases: list[tuple[int, float]], gpus: int, wait: LongestWait | None) -> None:
    assert longest_wait(bases, gpus) == wait
