"""How a batch is cut into passes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from serve_app.engine.drawing.arguments import seeds_of
from serve_app.engine.worker.passes import RequestSlice, images_in, split_into_passes, split_per_image
from tests.engine_cases import request

COUNTS = st.lists(st.integers(1, 8), min_size=1, max_size=6)


@given(COUNTS, st.integers(1, 10))
def test_every_image_is_drawn_once_in_order_and_no_pass_exceeds_the_limit(counts: list[int], at_most: int) -> None:
    passes = split_into_passes(counts, at_most)
    assert all(0 < images_in(whole) <= at_most for whole in passes)
    drawn = [(part.request_index, part.first + n) for whole in passes for part in whole for n in range(part.count)]
    assert drawn == [(request_index, n) for request_index, count in enumerate(counts) for n in range(count)]
    singles = [single for whole in passes for single in split_per_image(whole)]
    assert [(part.request_index, part.first) for (part,) in singles] == drawn


@given(COUNTS)
def test_without_a_limit_all_are_one_pass_of_whole_requests(counts: list[int]) -> None:
    assert split_into_passes(counts, None) == (
        tuple(RequestSlice(request_index, 0, count) for request_index, count in enumerate(counts)),
    )


def test_a_portion_of_a_request_has_the_seeds_of_the_whole_also_where_they_wrap() -> None:
    whole = request(seed=2**64 - 2, num_images=4, num_previews=2)
    parts = [RequestSlice(0, 0, 1).of(whole), RequestSlice(0, 1, 3).of(whole)]
    assert [seed for part in parts for seed in seeds_of(part)] == list(seeds_of(whole))
    assert {part.num_previews for part in parts} == {0}
    assert RequestSlice(0, 0, 4).of(whole) is whole
