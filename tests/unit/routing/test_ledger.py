from __future__ import annotations

from typing import Any

import pytest

from serve_app.routing.cost import ReplicaView, RequestLoad
from serve_app.routing.ledger import (
    MAX_DECAY_S,
    MAX_DISKS,
    REPORT_LAG_S,
    RESERVATION_TTL_S,
    ReplicaSnapshot,
    ReplicaStateCache,
)
from serve_app.routing.recorder import DeviceLoad, RoutingStatsCollector, Tiers
from serve_app.routing.stats import tag_of
from serve_app.work import LatencyModel
from tests.routing_cases import adapter, demand

NOW_S = 1_000_000.0
PACE = LatencyModel(fixed_s=0.5, unit_s=0.1)
GIGABYTE = 10**9


def told(
    at_s: float = NOW_S, backlog_s: float = 0.0, host: tuple[str, ...] = (), *, is_stalled: bool = False
) -> dict[str, Any]:
    """What a replica with these adapters tells at that time."""
    clock = iter([0.0, 0.0, 100.0, 100.0])
    recorder = RoutingStatsCollector(wall_clock=lambda: at_s, clock=lambda: next(clock), stall_after_s=10.0)
    load = DeviceLoad(backlog_s, PACE, progress=1.0, is_busy=is_stalled)
    tiers = Tiers([adapter(name).key for name in host], host_free_bytes=GIGABYTE)
    recorder.snapshot(load, tiers)
    return recorder.snapshot(load, tiers)


def seen(ledger: ReplicaStateCache, now_s: float = NOW_S, **news: dict[str, Any]) -> ReplicaStateCache:
    for id_, wire in news.items():
        ledger.update_snapshot(ReplicaSnapshot(id_, f"node-of-{id_[0]}", wire), now_s)
    ledger.retain(news.keys())
    return ledger


def view_of(ledger: ReplicaStateCache, id_: str, now_s: float = NOW_S) -> ReplicaView:
    return next(view for view in ledger.refresh_views(now_s) if view.id == id_)


@pytest.fixture
def ledger() -> ReplicaStateCache:
    return ReplicaStateCache(disk_bytes=20 * GIGABYTE, stale_after_s=15.0)


def asked(ledger: ReplicaStateCache, *names: str, units: float = 60.0) -> RequestLoad:
    return ledger.with_short_keys(demand(*names, units=units))


def test_what_was_just_sent_counts_at_once(ledger: ReplicaStateCache) -> None:
    seen(ledger, a=told(), b=told())
    ledger.add_in_flight("a", "1", asked(ledger, "x"), NOW_S)
    view = view_of(ledger, "a")
    assert view.backlog_s == PACE.seconds(60.0)
    assert tag_of(adapter("x").key) in view.arriving
    assert view.applied == {tag_of(adapter("x").key)}
    assert view_of(ledger, "b").backlog_s == 0


def test_a_request_stops_counting_once_the_replica_has_told_of_itself_after_taking_it(
    ledger: ReplicaStateCache,
) -> None:
    seen(ledger, a=told())
    ledger.add_in_flight("a", "1", asked(ledger, "x"), NOW_S)
    assert ledger.accepted("a", "1", NOW_S + 0.01) == "remote"
    seen(ledger, a=told(at_s=NOW_S + 0.02, backlog_s=3.0))
    assert view_of(ledger, "a", NOW_S + 0.02).backlog_s == pytest.approx(3.0 + PACE.seconds(60.0))
    later_s = NOW_S + 0.02 + 2 * REPORT_LAG_S
    seen(ledger, a=told(at_s=later_s, backlog_s=6.0))
    assert view_of(ledger, "a", later_s).backlog_s == 6.0


def test_a_request_that_ended_counts_no_more(ledger: ReplicaStateCache) -> None:
    seen(ledger, a=told())
    ledger.add_in_flight("a", "1", asked(ledger), NOW_S)
    ledger.accepted("a", "1", NOW_S)
    ledger.finished("a", "1")
    assert view_of(ledger, "a").backlog_s == 0


def test_work_that_a_replica_told_of_and_that_has_ended_since_counts_no_more(ledger: ReplicaStateCache) -> None:
    seen(ledger, a=told())
    ledger.add_in_flight("a", "1", asked(ledger), NOW_S)
    ledger.accepted("a", "1", NOW_S)
    told_s = NOW_S + 2 * REPORT_LAG_S
    seen(ledger, a=told(at_s=told_s, backlog_s=10.0))
    assert view_of(ledger, "a", told_s).backlog_s == 10.0
    ledger.finished("a", "1")
    assert view_of(ledger, "a", told_s + 0.01).backlog_s == 10.0 - PACE.seconds(60.0)
    seen(ledger, a=told(at_s=told_s + 1, backlog_s=4.0))
    assert view_of(ledger, "a", told_s + 1).backlog_s == 4.0


def test_a_request_that_a_replica_refused_counts_where_it_went_then(ledger: ReplicaStateCache) -> None:
    seen(ledger, a=told(), b=told())
    ledger.add_in_flight("a", "1", asked(ledger), NOW_S)
    ledger.add_in_flight("b", "1", asked(ledger), NOW_S)
    ledger.finished("a", "1")  # the refusal arrives late
    assert [view_of(ledger, id_).backlog_s > 0 for id_ in "ab"] == [False, True]


def test_a_choice_that_led_to_nothing_is_forgotten(ledger: ReplicaStateCache) -> None:
    seen(ledger, a=told())
    ledger.add_in_flight("a", "1", asked(ledger), NOW_S)
    assert view_of(ledger, "a", NOW_S + RESERVATION_TTL_S + 0.1).backlog_s == 0
    assert ledger.accepted("a", "1", NOW_S + 3) is None


def test_calls_without_work_are_not_booked(ledger: ReplicaStateCache) -> None:
    seen(ledger, a=told())
    ledger.add_in_flight("a", "1", asked(ledger, units=0.0), NOW_S)
    assert view_of(ledger, "a").backlog_s == 0


def test_a_backlog_is_worked_off_between_news_but_not_for_long(ledger: ReplicaStateCache) -> None:
    seen(ledger, a=told(backlog_s=10.0))
    assert view_of(ledger, "a", NOW_S + 0.3).backlog_s == pytest.approx(9.7)
    assert view_of(ledger, "a", NOW_S + 60).backlog_s == pytest.approx(10.0 - MAX_DECAY_S)


def test_a_replica_that_falls_silent_while_others_tell_is_suspect_until_it_tells_again(
    ledger: ReplicaStateCache,
) -> None:
    old, later_s = told(), NOW_S + 20
    seen(ledger, a=old, b=told())
    assert not view_of(ledger, "a").is_suspect
    seen(ledger, a=old, b=told(at_s=later_s))
    assert view_of(ledger, "a", later_s).is_suspect
    assert not view_of(ledger, "b", later_s).is_suspect
    seen(ledger, a=told(at_s=later_s), b=told(at_s=later_s))
    assert not view_of(ledger, "a", later_s).is_suspect


def test_when_all_are_silent_none_is_suspect(ledger: ReplicaStateCache) -> None:
    seen(ledger, a=told(), b=told())
    assert not any(view.is_suspect for view in ledger.refresh_views(NOW_S + 3600))


def test_a_replica_that_never_tells_anything_is_suspect_after_a_while(ledger: ReplicaStateCache) -> None:
    seen(ledger, a={}, b=told())
    assert not view_of(ledger, "a").is_suspect
    seen(ledger, now_s=NOW_S + 20, a={}, b=told(at_s=NOW_S + 20))
    assert view_of(ledger, "a", NOW_S + 20).is_suspect


def test_a_replica_whose_device_stands_still_is_suspect(ledger: ReplicaStateCache) -> None:
    seen(ledger, a=told(is_stalled=True), b=told())
    assert view_of(ledger, "a").is_suspect
    assert not view_of(ledger, "b").is_suspect


def test_replicas_join_and_leave(ledger: ReplicaStateCache) -> None:
    seen(ledger, a=told(), b=told())
    ledger.add_in_flight("a", "1", asked(ledger), NOW_S)
    seen(ledger, b=told(), c={})
    assert {view.id for view in ledger.refresh_views(NOW_S)} == {"b", "c"}
    assert ledger.accepted("a", "1", NOW_S) is None
    ledger.finished("a", "1")
    fresh = view_of(ledger, "c")
    assert (fresh.backlog_s, fresh.pace) == (0.0, PACE)


def test_before_a_replica_tells_what_serve_says_it_holds_counts_as_held(ledger: ReplicaStateCache) -> None:
    ledger.update_snapshot(ReplicaSnapshot("a", "node", {}, held=frozenset({adapter("x").key})), NOW_S)
    assert tag_of(adapter("x").key) in view_of(ledger, "a").host


def test_what_one_replica_of_a_node_held_is_on_the_disk_of_its_neighbours(ledger: ReplicaStateCache) -> None:
    seen(ledger, a1=told(host=("x",)), a2=told(), b1=told())
    seen(ledger, a1=told(at_s=NOW_S + 1), a2=told(), b1=told())
    tag = tag_of(adapter("x").key)
    assert [tag in view_of(ledger, id_).disk for id_ in ("a1", "a2", "b1")] == [True, True, False]


def test_a_disk_is_taken_to_hold_no_more_than_fits() -> None:
    ledger = ReplicaStateCache(disk_bytes=250_000_000)
    for name in "xyz":
        asked(ledger, name)
    for number, name in enumerate("xyz"):
        seen(ledger, a=told(at_s=NOW_S + number, host=(name,)))
    disk = view_of(ledger, "a").disk
    assert [tag_of(adapter(name).key) in disk for name in "xyz"] == [False, True, True]


def test_measurements_of_replicas_replace_the_default_costs_and_outliers_do_not(ledger: ReplicaStateCache) -> None:
    def with_fetch(factor: float) -> dict[str, Any]:
        return {**told(), "measured": (1.0, 1.0, factor)}

    seen(ledger, a=with_fetch(3.0), b=with_fetch(3.0), c=with_fetch(50.0), d=told())
    ledger.refresh_views(NOW_S)
    default = ReplicaStateCache(disk_bytes=0).costs
    assert ledger.costs.fetch == default.fetch.times(3.0)
    assert ledger.costs.swap == default.swap


@pytest.mark.parametrize("wire", [{}, {"at": "soon"}, {**told(), "pace": 1.0}, {"at": NOW_S, "backlog": 1.0}])
def test_news_in_another_versions_language_is_no_news(ledger: ReplicaStateCache, wire: dict[str, Any]) -> None:
    seen(ledger, a=wire, b=told(backlog_s=5.0))
    assert view_of(ledger, "a").backlog_s == 0
    assert view_of(ledger, "b").backlog_s == 5.0


def test_two_routers_that_see_only_their_own_requests_agree_again_with_the_next_news() -> None:
    """Each sends one request to the same idle replica; its news then shows both requests to both."""
    routers = [ReplicaStateCache(disk_bytes=0), ReplicaStateCache(disk_bytes=0)]
    for number, router in enumerate(routers):
        seen(router, a=told(), b=told())
        router.add_in_flight("a", str(number), asked(router, "x"), NOW_S)
        router.accepted("a", str(number), NOW_S)
    work_s, later_s = PACE.seconds(60.0), NOW_S + 0.2
    for router in routers:
        assert view_of(router, "a").backlog_s == work_s
        seen(router, a=told(at_s=later_s, backlog_s=2 * work_s), b=told(at_s=later_s))
        assert view_of(router, "a", later_s).backlog_s == pytest.approx(2 * work_s, abs=0.1)


def test_nodes_that_come_and_go_leave_nothing_behind_but_the_last_of_them() -> None:
    ledger = ReplicaStateCache(disk_bytes=20 * GIGABYTE)
    for number in range(3 * MAX_DISKS):
        ledger.update_snapshot(ReplicaSnapshot(f"replica-{number}", f"node-{number}", told(host=("x",))), NOW_S)
        ledger.retain({f"replica-{number}"})
    assert len(ledger._disks) == MAX_DISKS
    assert f"node-{3 * MAX_DISKS - 1}" in ledger._disks
