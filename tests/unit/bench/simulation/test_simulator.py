"""Simulated time passes as by hand, every request is answered once, and the policies come in their known order."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve_app.autoscaling.desired import ScalingRule
from serve_app.bench.simulation.compare import compare, figures_of, policies_named
from serve_app.bench.simulation.profile import BaseTimings, LinearCost, Profile, TierCosts, read_profile
from serve_app.bench.simulation.routers import POLICIES, Policy
from serve_app.bench.simulation.simulator import Fleet, Run, simulate
from serve_app.bench.traffic.workload import AdapterAsk, Arrival, Traffic, Workload, generate
from serve_app.work import LatencyModel

SIZE = 100
# A pass takes 10 s, a swap 1 s, a fetch 3 s, a read from the disk 2 s; host memory holds two adapters.
BY_HAND = Profile(
    name="by hand",
    about="",
    bases={"*": BaseTimings(LatencyModel(10.0, 0.0), start_s=4.0)},
    costs=TierCosts(LinearCost(1.0, 0.0), LinearCost(0.0, 0.0), LinearCost(2.0, 0.0), LinearCost(3.0, 0.0)),
    blog_swap_s=5.0,
    host_cache_bytes=2 * SIZE,
    disk_cache_bytes=100 * SIZE,
    max_batch_images=4,
    replicas_per_node=1,
    sources={},
    unproved=(),
)
LORAPLEX, WHOLE, UNSPREAD, LEAST_WORK, RANDOM_TWO, LEAST_LOADED, LATE, RAY, HASH, AFFINITY, BLOG = POLICIES


def asked(*requests: tuple[float, str]) -> Workload:
    """Return one request a pair of a time and an adapter, the base alone for an empty name; two images each."""
    arrivals = tuple(Arrival(at_s, "b", (AdapterAsk(key),) if key else (), images=2) for at_s, key in requests)
    return Workload(arrivals, {key: SIZE for _, key in requests if key})


def play(workload: Workload, policy: Policy = LORAPLEX, replicas: int = 1, profile: Profile = BY_HAND) -> Run:
    return simulate(workload, profile, policy, Fleet(replicas), seed=0)


def test_a_lone_request_is_fetched_swapped_and_drawn() -> None:
    run = play(asked((0, "a")))
    assert list(run.latencies_s) == [3 + 1 + 10]
    assert (run.fetches, run.disk_reads, run.swaps, run.passes, run.busy_s) == (1, 0, 1, 1, 11)


def test_the_base_alone_needs_neither_fetch_nor_swap() -> None:
    run = play(asked((0, "")))
    assert list(run.latencies_s) == [10]
    assert (run.fetches, run.swaps) == (0, 0)


def test_fetching_hides_behind_the_running_pass() -> None:
    # a is ready at 3 and runs to 14; b was fetched by then, swaps and runs to 25.
    assert list(play(asked((0, "a"), (1, "b"))).latencies_s) == [14, 24]


def test_fetching_at_its_turn_makes_the_next_wait() -> None:
    assert list(play(asked((0, "a"), (1, "b")), LATE).latencies_s) == [14, 27]


def test_the_blog_s_swap_replaces_ours() -> None:
    assert list(play(asked((0, "a"), (1, "b")), BLOG).latencies_s) == [3 + 5 + 10, 18 + 3 + 5 + 10 - 1]


def test_requests_alike_share_a_pass() -> None:
    # The second and third wait for the first, and together make one batch of four images, without a swap.
    run = play(asked((0, "a"), (5, "a"), (6, "a")))
    assert list(run.latencies_s) == [14, 19, 18]
    assert (run.passes, run.swaps) == (2, 1)


def test_another_scale_is_another_swap_but_no_other_file() -> None:
    workload = Workload(
        (Arrival(0, "b", (AdapterAsk("a", 1.0),)), Arrival(20, "b", (AdapterAsk("a", 0.5),))), {"a": SIZE}
    )
    run = play(workload)
    assert list(run.latencies_s) == [14, 11]
    assert (run.fetches, run.swaps) == (1, 2)


def test_what_was_evicted_comes_back_from_the_disk() -> None:
    run = play(asked((0, "a"), (30, "b"), (60, "c"), (90, "a")))
    assert list(run.latencies_s) == [14, 14, 14, 2 + 1 + 10]
    assert (run.fetches, run.disk_reads) == (3, 1)


def test_replicas_of_a_node_fetch_an_adapter_once() -> None:
    profile = replace(BY_HAND, replicas_per_node=2)
    run = play(asked((0, "a"), (1, "a")), LEAST_LOADED, 2, profile)
    assert (run.fetches, run.disk_reads) == (1, 1)
    # The second one's copy is read once the first one's is there, at 3.
    assert list(run.latencies_s) == [14, 2 + 2 + 1 + 10]


def test_a_hot_adapter_spreads_with_ours_and_waits_with_affinity() -> None:
    workload = asked((0, ""), *((number + 1, "a") for number in range(6)))
    profile = replace(BY_HAND, max_batch_images=1)
    assert max(play(workload, LORAPLEX, 3, profile).latencies_s) < 40
    assert max(play(workload, AFFINITY, 3, profile).latencies_s) > 55


def test_a_request_goes_where_its_adapter_is_when_that_is_no_later() -> None:
    workload = asked((0, "a"), (0, "b"), (60, "a"), (60.5, "b"), (120, "b"), (120.5, "a"))
    run = play(workload, LORAPLEX, 2)
    assert run.fetches == 2


def test_ray_s_router_spills_only_when_the_holder_is_full() -> None:
    profile = replace(BY_HAND, max_batch_images=1)
    workload = asked((0, "a"), *((1 + number / 100, "a") for number in range(15)))
    assert play(workload, RAY, 2, profile).fetches == 1
    fuller = asked((0, "a"), *((1 + number / 100, "a") for number in range(16)))
    assert play(fuller, RAY, 2, profile).fetches == 2


def test_a_consistent_ring_keeps_an_adapter_where_it_is_while_there_is_room() -> None:
    run = play(asked(*((60.0 * number, "a") for number in range(5))), HASH, 4)
    assert run.fetches == 1


EVENTS = st.lists(
    st.tuples(st.floats(0, 200), st.sampled_from(["", "a", "b", "c", "d", "e"])), min_size=1, max_size=25
).map(lambda pairs: sorted(pairs))


@settings(max_examples=40, deadline=None)
@given(EVENTS, st.sampled_from(POLICIES), st.integers(1, 4), st.floats(0, 0.5))
def test_every_request_is_answered_once_and_none_before_its_work_is_done(
    events: list[tuple[float, str]], policy: Policy, replicas: int, noise: float
) -> None:
    run = simulate(asked(*events), BY_HAND, policy, Fleet(replicas), seed=1, noise=noise)
    assert len(run.latencies_s) == len(events)
    least_s = 10.0 if noise == 0 else 0.0
    assert min(run.latencies_s) >= least_s - 1e-9
    assert run.passes <= len(events)
    assert run.busy_s <= run.replica_s + 1e-6


def test_same_seed_gives_the_same_run_and_noise_changes_it() -> None:
    workload = generate(replace(Traffic(), requests=300, users=20), 0)
    profile = read_profile("a10g")
    first, second = (simulate(workload, profile, LORAPLEX, Fleet(3), seed=7, noise=0.2) for _ in range(2))
    assert first == second
    assert simulate(workload, profile, LORAPLEX, Fleet(3), seed=8, noise=0.2).latencies_s != first.latencies_s


def test_policies_come_in_the_order_of_the_calibrated_day() -> None:
    workload = generate(Traffic(), 1)
    chosen = policies_named(["loraplex", "least-loaded", "ray-multiplexed", "affinity", "blog"])
    found = compare([workload], read_profile("calibrated"), chosen, {"sdxl": Fleet(3)})
    p95 = {result.policy: result.seeds[0].p95_s for result in found.results}
    fetches = {result.policy: result.seeds[0].fetches for result in found.results}
    assert p95["loraplex"] < 0.9 * p95["least-loaded"] < p95["affinity"] < p95["blog"]
    assert p95["loraplex"] < 0.75 * p95["ray-multiplexed"]
    assert fetches["loraplex"] < 0.75 * fetches["least-loaded"]


def test_replicas_are_added_in_a_burst_and_let_go_after_it() -> None:
    workload = asked(*((100 + number / 10, "a") for number in range(40)), (2000, "a"))
    profile = replace(BY_HAND, max_batch_images=1)
    rule = ScalingRule(20.0, start_s=4.0, min_replicas=1, max_replicas=12)
    scaled = simulate(workload, profile, LORAPLEX, Fleet(1, rule, downscale_delay_s=60.0), seed=0)
    alone = simulate(workload, profile, LORAPLEX, Fleet(1), seed=0)
    full = simulate(workload, profile, LORAPLEX, Fleet(12), seed=0)
    assert len(scaled.latencies_s) == 41
    assert scaled.most > 5
    # What the first replica had accepted before others were there stays with it.
    assert max(scaled.latencies_s) < 0.5 * max(alone.latencies_s)
    assert scaled.replica_s < 0.3 * full.replica_s


def test_from_no_replica_at_all_everything_is_answered() -> None:
    rule = ScalingRule(20.0, start_s=4.0, max_replicas=2)
    run = simulate(asked((0.5, "a"), (900, "b")), BY_HAND, LORAPLEX, Fleet(0, rule, 30.0), seed=0)
    # The rule is asked every second; then a replica starts for 4 s.
    assert run.latencies_s[0] == pytest.approx(0.5 + 4 + 14)
    assert run.latencies_s[1] <= 1 + 4 + 14
    assert figures_of([run]).replica_hours < 300 / 3600


def test_from_no_replica_as_many_start_at_once_as_the_fleet_says() -> None:
    workload = asked((0.5, ""), (0.5, ""))
    rule = ScalingRule(10.0, start_s=4.0, max_replicas=2)
    several = simulate(workload, BY_HAND, LORAPLEX, Fleet(0, rule, from_zero=2, max_ongoing=1), seed=0)
    assert list(several.latencies_s) == [0.5 + 4 + 10, 0.5 + 4 + 10]
    # By itself the first one starts first, and the rule is asked for the second when it runs.
    alone = simulate(workload, BY_HAND, LORAPLEX, Fleet(0, rule, max_ongoing=1), seed=0)
    assert sorted(alone.latencies_s)[0] == 0.5 + 4 + 10
    assert sorted(alone.latencies_s)[1] >= 0.5 + 4 + 4 + 10


def test_a_new_replica_gets_what_the_first_has_not_begun() -> None:
    workload = asked(*((0.0, "") for _ in range(8)))
    profile = replace(BY_HAND, max_batch_images=1)
    rule = ScalingRule(10.0, start_s=4.0, min_replicas=1, max_replicas=4)
    worst = [
        max(simulate(workload, profile, policy, Fleet(1, rule), seed=0).latencies_s) for policy in (WHOLE, LORAPLEX)
    ]
    assert worst[0] == 80
    assert worst[1] < 40


# One image of 20 steps takes 20 s, on the base alone without a swap.
BY_STEPS = replace(BY_HAND, bases={"*": BaseTimings(LatencyModel(0.0, 1 / (2 * 1.024**2 * 1000**2 / 1e6)), 4.0)})


def images(*requests: tuple[float, int]) -> Workload:
    """Return one request a pair of a time and a number of images of 20 s each."""
    return Workload(tuple(Arrival(at_s, "b", (), steps=20, images=count) for at_s, count in requests), {})


def test_a_short_request_overtakes_a_long_one_at_its_next_step() -> None:
    workload = images((0, 8), (10.5, 1))
    assert list(play(workload, UNSPREAD, 1, BY_STEPS).latencies_s) == pytest.approx([180, 16 + 20 - 10.5 + 0])
    assert list(play(workload, WHOLE, 1, BY_STEPS).latencies_s) == pytest.approx([160, 160 + 20 - 10.5])


def test_a_request_s_images_are_drawn_where_each_would_end_first() -> None:
    alone = list(play(images((0, 8)), LORAPLEX, 4, BY_STEPS).latencies_s)
    assert alone == pytest.approx([40])
    assert list(play(images((0, 8)), UNSPREAD, 4, BY_STEPS).latencies_s) == pytest.approx([160])
    assert list(play(images((0, 2)), LORAPLEX, 2, BY_STEPS).latencies_s) == pytest.approx([20 * 1.15])


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.floats(0, 300), st.sampled_from([1, 2, 8])), min_size=1, max_size=25), st.integers(1, 3))
def test_taking_turns_loses_no_work_and_spreading_no_image(asked_for: list[tuple[float, int]], replicas: int) -> None:
    workload = images(*sorted(asked_for))
    whole = play(workload, WHOLE, replicas, BY_STEPS)
    shared = play(workload, UNSPREAD, replicas, BY_STEPS)
    assert shared.busy_s == pytest.approx(whole.busy_s)
    assert min(shared.latencies_s) >= 20 - 1e-6
    assert min(play(workload, LORAPLEX, replicas, BY_STEPS).latencies_s) >= 20 - 1e-6
