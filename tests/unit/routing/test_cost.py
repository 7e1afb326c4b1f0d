from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.routing.cost import SWAP_S, ReplicaView, cost_s, load_of, rank
from tests.routing_cases import generation, load, view

names = st.lists(st.sampled_from("abcd"), max_size=3, unique=True).map(tuple)
views = st.lists(st.builds(view, st.just(""), st.floats(0, 300), held=names, fused=names), min_size=1, max_size=6)


def first(replicas: list[ReplicaView], *adapters: str) -> str:
    return rank(load(*adapters), replicas, rng=Random(0))[0]


def test_the_least_work_comes_first() -> None:
    assert rank(load(), [view("r0", 3.0), view("r1", 1.0), view("r2", 2.0)], rng=Random(0)) == ["r1", "r2", "r0"]


def test_of_idle_replicas_the_holder_comes_first() -> None:
    assert first([view("r0"), view("r1", held=("a",)), view("r2", held=("b",))], "a") == "r1"


def test_nobody_waits_for_a_holder_longer_than_a_fetch_counts() -> None:
    fetch_s = load("a").adapters[0].fetch_s
    assert first([view("r0"), view("r1", fetch_s - 0.1, held=("a",))], "a") == "r1"
    assert first([view("r0"), view("r1", fetch_s + 0.1, held=("a",))], "a") == "r0"


def test_a_tie_goes_to_the_replica_that_needs_no_swap_then_to_a_holder() -> None:
    assert first([view("r0", held=("a",)), view("r1", held=("a",), fused=("a",))], "a") == "r1"
    assert first([view("r0", SWAP_S + 0.02, held=("a",), fused=("a",)), view("r1", held=("a",))], "a") == "r1"


def test_the_same_adapters_at_another_scale_need_a_swap() -> None:
    fused = view("r1", held=("a",), fused=("a",))
    assert load("a").composition in fused.fused
    assert load_of(generation(0, "a", scale=0.5)).composition not in fused.fused


def test_a_request_for_the_base_alone_prefers_weights_without_an_adapter() -> None:
    assert first([view("r0", fused=("a",)), view("r1")]) == "r1"


def test_several_adapters_weigh_by_what_is_missing() -> None:
    replicas = [view("r0", held=("a",)), view("r1", held=("a", "b")), view("r2")]
    assert rank(load("a", "b"), replicas, rng=Random(0)) == ["r1", "r0", "r2"]


def test_a_larger_missing_adapter_counts_more() -> None:
    small, large = load("a", size_bytes=10**6), load("a", size_bytes=10**9)
    assert cost_s(large, view("r")) - cost_s(small, view("r")) == pytest.approx(9.99)


def test_ties_are_spread() -> None:
    rng = Random(0)
    firsts = Counter(rank(load(), [view(f"r{index}") for index in range(4)], rng=rng)[0] for _ in range(400))
    assert min(firsts.values()) > 60


@given(views, names)
def test_what_is_chosen_has_at_most_a_fetch_and_a_swap_more_ahead_than_any_other(
    replicas: list[ReplicaView], adapters: tuple[str, ...]
) -> None:
    for index, replica in enumerate(replicas):
        replica.id = str(index)
    asked = load(*adapters)
    chosen = replicas[int(rank(asked, replicas, rng=Random(0))[0])]
    bound_s = sum(need.fetch_s for need in asked.adapters) + SWAP_S + 0.011
    assert chosen.ahead_s <= min(replica.ahead_s for replica in replicas) + bound_s
