from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from serve_app.routing.cost import (
    LinearCost,
    ReplicaView,
    RequestLoad,
    TierCosts,
    cost_s,
    finish_s,
    location_of,
    predict,
    rank,
)
from tests.routing_cases import COSTS, KEYS, adapter, demand, demands, fleets, keys, refresh_views, view

TIE_S = 0.01


def best(asked: RequestLoad, *fleet: ReplicaView, costs: TierCosts = COSTS) -> list[str]:
    return rank(asked, fleet, costs, rng=Random(0))[0]


def test_equally_busy_replicas_are_ranked_by_how_near_the_adapter_is() -> None:
    fleet = [
        view("remote"),
        view("disk", disk=keys("a")),
        view("arriving", arriving=keys("a")),
        view("host", host=keys("a")),
        view("device", device=keys("a")),
        view("applied", applied=keys("a")),
    ]
    order = rank(demand("a"), fleet, COSTS, rng=Random(0), tie_s=0.0)
    assert order == [["applied"], ["device"], ["host"], ["disk"], ["arriving"], ["remote"]]


def test_the_replica_that_holds_the_adapter_wins_until_its_queue_costs_more_than_a_fetch() -> None:
    fetch_s = COSTS.fetch.seconds(adapter().size_bytes)
    warm = view("warm", backlog_s=fetch_s - 0.1, host=keys("a"))
    assert best(demand("a"), warm, view("cold")) == ["warm"]
    assert best(demand("a"), replace(warm, backlog_s=fetch_s + 0.1), view("cold")) == ["cold"]


def test_a_base_only_request_prefers_the_replica_with_the_base_in_its_weights() -> None:
    assert best(demand(), view("adapted", applied=keys("a")), view("plain")) == ["plain"]
    swap_s = COSTS.swap.fixed_s
    assert best(demand(), view("adapted", applied=keys("a")), view("plain", backlog_s=swap_s + 0.1)) == ["adapted"]


def test_a_request_of_two_adapters_goes_where_more_of_them_are() -> None:
    one, both = view("one", host=keys("a")), view("both", host=keys("a", "b"))
    assert best(demand("a", "b"), one, both) == ["both"]
    assert best(demand("a", "b"), one, view("none")) != ["none"]


def test_adapters_are_fetched_together_and_while_the_device_is_busy() -> None:
    slow_s = COSTS.fetch.seconds(adapter().size_bytes)
    assert predict(demand("a", "b"), view("cold"), COSTS).wait_s == slow_s
    assert predict(demand("a", "b"), view("busy", backlog_s=2 * slow_s), COSTS).wait_s == 2 * slow_s


def test_applied_means_exactly_these_adapters_and_no_other() -> None:
    assert predict(demand("a"), view("r", applied=keys("a")), COSTS).swap_s == 0
    assert predict(demand("a"), view("r", applied=keys("a", "b")), COSTS).swap_s > 0
    assert predict(demand("a", "b"), view("r", applied=keys("a"), host=keys("b")), COSTS).swap_s > 0


def test_evicting_counts_against_a_full_replica() -> None:
    roomy, full = view("roomy"), view("full", host_free_bytes=0.0, evicts_to_disk=False)
    assert best(demand("a"), full, roomy) == ["roomy"]
    to_disk = replace(full, evicts_to_disk=True)
    assert cost_s(demand("a"), roomy, COSTS) < cost_s(demand("a"), to_disk, COSTS) < cost_s(demand("a"), full, COSTS)


def test_longer_requests_before_it_weigh_more_than_many_short_ones() -> None:
    one_long, three_short = view("long", backlog_s=40.0), view("short", backlog_s=3 * 8.0)
    assert best(demand("a"), one_long, three_short) == ["short"]


def test_a_faster_replica_wins_a_long_request() -> None:
    slow = view("slow")
    fast = replace(view("fast", backlog_s=1.0), pace=replace(slow.pace, unit_s=slow.pace.unit_s / 2))
    assert best(demand(units=100.0), slow, fast) == ["fast"]
    assert best(demand(units=1.0), slow, fast) == ["slow"]


def test_a_suspect_replica_comes_after_all_others_and_is_still_there() -> None:
    fleet = [view("hung", is_suspect=True), view("busy", backlog_s=500.0)]
    assert rank(demand(), fleet, COSTS, rng=Random(0)) == [["busy"], ["hung"]]
    assert rank(demand(), fleet[:1], COSTS, rng=Random(0)) == [["hung"]]


def test_ties_spread_evenly() -> None:
    rng = Random(1)
    fleet = [view(f"r{index}") for index in range(4)]
    firsts = Counter(rank(demand("a"), fleet, COSTS, rng=rng)[0][0] for _ in range(4000))
    assert min(firsts.values()) > 900


def test_the_place_is_that_of_the_farthest_adapter() -> None:
    mixed = view("r", applied=keys("a"), host=keys("b"), disk=keys("c"))
    assert [location_of(demand(*names), mixed) for names in ("", "a", "ab", "abc", "abcd")] == [
        "base", "applied", "host", "disk", "remote",
    ]  # fmt: skip


@given(demands, fleets())
def test_every_replica_is_ranked_exactly_once(asked: RequestLoad, fleet: list[ReplicaView]) -> None:
    order = rank(asked, fleet, COSTS, rng=Random(0))
    assert sorted(id_ for members in order for id_ in members) == sorted(view.id for view in fleet)


@given(demands, fleets(least=2), st.integers())
def test_nobody_waits_for_a_warm_replica_longer_than_a_cold_one_costs(
    asked: RequestLoad, fleet: list[ReplicaView], seed: int
) -> None:
    by_id = {view.id: view for view in fleet}
    chosen = by_id[rank(asked, fleet, COSTS, rng=Random(seed), tie_s=TIE_S)[0][0]]
    for other in fleet:
        displacement_cost_s = predict(asked, other, COSTS).displacement_cost_s
        assert finish_s(asked, chosen, COSTS) <= finish_s(asked, other, COSTS) + displacement_cost_s + TIE_S + 1e-9


@given(demands, refresh_views)
def test_the_burden_is_bounded_by_what_bringing_the_adapters_takes(asked: RequestLoad, at: ReplicaView) -> None:
    whole_s = COSTS.fetch.seconds(sum(need.size_bytes for need in asked.adapters))
    bound_s = (COSTS.fetch_share + COSTS.evict_share) * whole_s
    assert 0 <= predict(asked, at, COSTS).displacement_cost_s <= bound_s + 1e-6


@given(demands, refresh_views, st.floats(0, 100))
def test_more_work_ahead_never_makes_a_replica_cheaper(asked: RequestLoad, at: ReplicaView, more_s: float) -> None:
    busier = replace(at, backlog_s=at.backlog_s + more_s)
    assert cost_s(asked, at, COSTS) <= cost_s(asked, busier, COSTS) + 1e-9
    assert finish_s(asked, at, COSTS) <= finish_s(asked, busier, COSTS)


@given(demands, refresh_views, st.sampled_from(KEYS))
def test_holding_an_adapter_never_makes_a_replica_dearer(asked: RequestLoad, at: ReplicaView, key: str) -> None:
    tier = at.host
    assert isinstance(tier, frozenset)
    warmer = replace(at, host=tier | {key})
    assert cost_s(asked, warmer, COSTS) <= cost_s(asked, at, COSTS) + 1e-9


@given(demands, refresh_views, st.floats(0, 200))
def test_a_longer_request_never_finishes_earlier(asked: RequestLoad, at: ReplicaView, more: float) -> None:
    longer = replace(asked, units=asked.units + more)
    assert finish_s(asked, at, COSTS) <= finish_s(longer, at, COSTS)


@given(demands, refresh_views)
def test_the_short_way_and_the_explained_one_agree(asked: RequestLoad, at: ReplicaView) -> None:
    prediction = predict(asked, at, COSTS)
    assert abs(prediction.cost_s - cost_s(asked, at, COSTS)) < 1e-6
    assert prediction.finish_s == finish_s(asked, at, COSTS)


def test_measured_costs_replace_the_defaults_in_proportion() -> None:
    measured = TierCosts(fetch=LinearCost(1.0, 1e-8)).measured(fetch=3.0)
    assert measured.fetch.seconds(10**8) == 6.0
    assert measured.swap == TierCosts().swap


def test_one_hot_adapter_at_nine_tenths_starves_nobody() -> None:
    """Three replicas fed at four fifths of what they can do; whoever comes waits no longer than its bound."""
    rng, work_s, now_s = Random(3), 6.5, 0.0
    free_s = dict.fromkeys(("r0", "r1", "r2"), 0.0)
    host: dict[str, list[str]] = {name: [] for name in free_s}
    worst_excess_s = 0.0
    for number in range(2000):
        now_s += rng.expovariate(0.8 * len(free_s) / work_s)
        asked = demand("hot" if rng.random() < 0.9 else f"rare{number % 50}")
        fleet = [view(name, max(free_s[name] - now_s, 0.0), host=frozenset(host[name][-8:])) for name in free_s]
        name = rank(asked, fleet, COSTS, rng=rng)[0][0]
        predictions = {at.id: predict(asked, at, COSTS) for at in fleet}
        least_s = min(at.finish_s for at in predictions.values())
        bound_s = 2 * COSTS.fetch.seconds(adapter().size_bytes)
        worst_excess_s = max(worst_excess_s, predictions[name].finish_s - least_s - bound_s)
        free_s[name] = now_s + predictions[name].finish_s
        host[name].append(asked.adapters[0].key)
    assert worst_excess_s <= 0
