"""Few names, whatever is asked for."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from serve_app.observability.bounded_labels import COUNTED_PER_SLOT, HALF_LIFE_S, NAMES_PER_SLOT, OTHER, BoundedLabels
from tests.clock import Clock


def labels(top: BoundedLabels, adapter: str, uses: int) -> list[str]:
    return [top.label(adapter) for _ in range(uses)]


def test_the_first_to_come_are_named_and_the_rest_are_one() -> None:
    top = BoundedLabels(2, clock=Clock())
    assert [top.label(name) for name in "abca"] == ["a", "b", OTHER, "a"]


def test_who_is_asked_for_clearly_more_often_pushes_out_the_least() -> None:
    top = BoundedLabels(2, clock=Clock())
    labels(top, "a", 9)
    labels(top, "b", 2)
    assert labels(top, "new", 6) == [OTHER] * 4 + ["new"] * 2
    assert top.label("b") == OTHER
    assert top.label("a") == "a"


def test_a_walk_through_all_adapters_pushes_nobody_out() -> None:
    clock = Clock()
    top = BoundedLabels(2, clock=clock)
    labels(top, "a", 3)
    labels(top, "b", 3)
    clock.now = 2 * HALF_LIFE_S
    assert {top.label(f"walk/{index}") for index in range(1000)} == {OTHER}
    assert top.label("a") == "a"


def test_what_was_popular_long_ago_makes_room() -> None:
    clock = Clock()
    top = BoundedLabels(1, clock=clock)
    labels(top, "old", 1000)
    clock.now = 20 * HALF_LIFE_S
    assert labels(top, "new", 5)[-1] == "new"


def test_no_places_name_nobody() -> None:
    assert BoundedLabels(0, clock=Clock()).label("a") == OTHER


@given(
    st.integers(1, 3),
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 12), st.floats(0, 5 * HALF_LIFE_S)), max_size=300),
)
def test_names_and_counts_are_bounded_for_the_life_of_a_process(
    places: int, uses: list[tuple[int, int, float]]
) -> None:
    clock = Clock()
    top = BoundedLabels(places, clock=clock)
    told: set[str] = set()
    for adapter, times, pause_s in uses:
        clock.now += pause_s
        told.update(labels(top, f"me/{adapter}", times))
        assert len(top._named) <= places
        assert len(top._uses) <= places * (1 + COUNTED_PER_SLOT)
    assert len(told - {OTHER}) <= places * NAMES_PER_SLOT
