"""What a router knows between two reports; time is the test's, and no clock of a replica is in any report."""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

import pytest

from serve_app.routing.cost import STALLED_S, ReplicaView, load_of, rank, tier_of
from serve_app.routing.fleet import MAX_DECAY_S, RESERVATION_TTL_S, UNREPORTED_TTL_S, ReplicaStates
from serve_app.routing.stats import ReplicaStats, encode, request_tag
from tests.routing_cases import PACE, generation, key

NOW_S = 100.0


def report(sequence: int, ahead_s: float = 0.0, *counted: int) -> dict[str, Any]:
    """A report that counts these requests of `generation`."""
    tags = frozenset(request_tag(generation(number, "a")) for number in counted)
    return encode(ReplicaStats(sequence, ahead_s, PACE, counted=tags))


def send(states: ReplicaStates, id_: str, number: int, now_s: float = NOW_S, *, is_accepted: bool = True) -> float:
    request = generation(number, "a")
    states.send(id_, f"i{number}", request_tag(request), load_of(request), now_s)
    if is_accepted:
        states.accept(id_, f"i{number}")
    return PACE.seconds(load_of(request).units)


def seen(states: ReplicaStates, now_s: float = NOW_S, **reports: dict[str, Any]) -> None:
    for id_, wire in reports.items():
        states.update(id_, wire, frozenset(), now_s)


def view(states: ReplicaStates, id_: str, now_s: float = NOW_S) -> ReplicaView:
    found = states.view(id_, now_s)
    assert found is not None
    return found


@pytest.fixture
def states() -> ReplicaStates:
    states = ReplicaStates(stale_after_s=15.0)
    seen(states, a=report(1), b=report(1))
    return states


def test_what_was_just_sent_counts_at_once_with_its_adapters_and_composition(states: ReplicaStates) -> None:
    work_s = send(states, "a", 0, is_accepted=False)
    there = view(states, "a")
    assert there.ahead_s == work_s
    assert tier_of(load_of(generation(1, "a")), there) == "applied"
    assert tier_of(load_of(generation(1, "a", scale=0.5)), there) == "host"
    assert view(states, "b").ahead_s == 0


def test_a_request_counts_until_a_report_counts_it_however_late_that_comes(states: ReplicaStates) -> None:
    work_s = send(states, "a", 0)
    # A report that was on its way when the request was accepted says nothing of it, in whatever time it comes.
    for sequence, later_s in ((2, 0.001), (3, 5.0)):
        seen(states, NOW_S + later_s, a=report(sequence, 3.0))
        assert view(states, "a", NOW_S + later_s).ahead_s == 3.0 + work_s
    seen(states, NOW_S + 5.1, a=report(4, 6.0, 0))
    assert view(states, "a", NOW_S + 5.1).ahead_s == 6.0


def test_a_request_that_ended_counts_no_more_whether_it_was_reported_or_not(states: ReplicaStates) -> None:
    work_s = send(states, "a", 0)
    states.finish("a", "i0")
    assert view(states, "a").ahead_s == 0
    send(states, "a", 1)
    seen(states, a=report(2, 10.0, 1))
    states.finish("a", "i1")
    assert view(states, "a").ahead_s == 10.0 - work_s


def test_a_request_whose_end_was_heard_of_before_its_acceptance_counts_until_a_late_report(
    states: ReplicaStates,
) -> None:
    send(states, "a", 0, is_accepted=False)
    states.finish("a", "i0")
    assert view(states, "a").ahead_s == 0
    work_s = send(states, "a", 0)
    for sequence, later_s, ahead_s in ((2, UNREPORTED_TTL_S, work_s), (3, UNREPORTED_TTL_S + 0.1, 0)):
        seen(states, NOW_S + later_s, a=report(sequence))
        there = view(states, "a", NOW_S + later_s)
        assert there.ahead_s == ahead_s
        assert there.holds(key("a")) is bool(ahead_s)


def test_a_request_that_a_replica_refused_counts_where_it_went_then(states: ReplicaStates) -> None:
    send(states, "a", 0)
    work_s = send(states, "b", 0)
    states.finish("a", "i0")  # the refusal arrives late
    assert (view(states, "a").ahead_s, view(states, "b").ahead_s) == (0, work_s)


def test_a_choice_that_led_to_nothing_is_forgotten(states: ReplicaStates) -> None:
    send(states, "a", 0, is_accepted=False)
    assert view(states, "a", NOW_S + RESERVATION_TTL_S + 0.1).ahead_s == 0


def test_reported_work_is_worked_off_but_not_for_ever(states: ReplicaStates) -> None:
    seen(states, a=report(2, 30.0))
    assert view(states, "a", NOW_S + 1).ahead_s == 29.0
    assert view(states, "a", NOW_S + 60).ahead_s == 30.0 - MAX_DECAY_S


def test_a_report_that_was_taken_in_before_changes_nothing(states: ReplicaStates) -> None:
    seen(states, a=report(2, 30.0))
    seen(states, NOW_S + 1, a=report(2, 30.0))
    assert view(states, "a", NOW_S + 1).ahead_s == 29.0


def test_a_replica_that_is_silent_while_others_report_is_taken_to_be_stalled(states: ReplicaStates) -> None:
    seen(states, NOW_S + 10, b=report(2))
    assert view(states, "a", NOW_S + 10).ahead_s == 0
    seen(states, NOW_S + 16, b=report(3))
    assert view(states, "a", NOW_S + 16).ahead_s == STALLED_S
    seen(states, NOW_S + 17, a=report(2))
    assert view(states, "a", NOW_S + 17).ahead_s == 0


def test_if_all_fall_silent_none_is_taken_to_be_stalled(states: ReplicaStates) -> None:
    assert [each.ahead_s for each in states.views(NOW_S + 1000)] == [0, 0]


def test_a_stalled_replica_is_not_worked_off(states: ReplicaStates) -> None:
    seen(states, a=report(2, STALLED_S))
    assert view(states, "a", NOW_S + 60).ahead_s == STALLED_S


def test_what_a_replica_holds_is_what_rays_record_says(states: ReplicaStates) -> None:
    load = load_of(generation(0, "a"))
    assert tier_of(load, view(states, "a")) == "remote"
    states.update("a", report(2), {key("a")}, NOW_S)
    assert tier_of(load, view(states, "a")) == "host"
    states.update("a", report(2), frozenset(), NOW_S)
    assert tier_of(load, view(states, "a")) == "remote"


@pytest.mark.parametrize("wire", [{}, {"seq": "x"}, {"backlog": 3.0, "at": 1.0}])
def test_a_replica_that_reports_nothing_or_another_versions_form_counts_as_idle(wire: dict[str, Any]) -> None:
    states = ReplicaStates()
    seen(states, a=wire)
    assert view(states, "a").ahead_s == 0


def test_a_replica_that_is_gone_is_forgotten_with_what_was_sent_there(states: ReplicaStates) -> None:
    send(states, "a", 0)
    states.retain({"b"})
    states.finish("a", "i0")
    assert states.view("a", NOW_S) is None
    assert len(states.views(NOW_S)) == 1


def test_a_burst_spreads_evenly_though_reports_come_late() -> None:
    states, sent, rng = ReplicaStates(), Counter[str](), Random(0)
    counted: dict[str, list[int]] = {f"r{index}": [] for index in range(8)}
    late = {id_: report(1) for id_ in counted}
    for number in range(40):
        now_s = NOW_S + number * 0.005
        if number % 20 == 0:
            # What was reported a tenth of a second ago arrives now.
            seen(states, now_s, **late)
            work_s = PACE.seconds(load_of(generation(0, "a")).units)
            late = {id_: report(number + 2, len(taken) * work_s, *taken) for id_, taken in counted.items()}
        id_ = rank(load_of(generation(number, "a")), states.views(now_s), rng=rng)[0]
        send(states, id_, number, now_s)
        counted[id_].append(number)
        sent[id_] += 1
    assert set(sent.values()) == {5}


def test_a_report_has_no_time_in_it_so_that_clocks_of_nodes_may_differ() -> None:
    assert set(report(1)) == {"seq", "ahead", "pace", "fused", "counted"}
