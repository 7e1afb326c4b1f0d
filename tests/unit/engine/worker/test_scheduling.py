"""Which waiting requests run next, together."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from serve_app.core import PixelImage, PixelMask
from serve_app.engine.worker.scheduling import Batch, BatchKey, QueuedRequest, QueuePolicy, batch_key
from serve_app.engine.worker.scheduling import next_batch as next_batch_of
from tests.engine_cases import request

KEYS = tuple(batch_key(request(steps=steps), ()) for steps in (1, 2, 3))


def waiting(*items: tuple[BatchKey, int]) -> list[QueuedRequest]:
    return [QueuedRequest(job_id, key, num_images) for job_id, (key, num_images) in enumerate(items)]


def next_batch(queue: list[QueuedRequest], *, max_images: int) -> Batch | None:
    """Choose with nothing applied that anybody could be overtaken for."""
    return next_batch_of(queue, applied=None, now_s=0.0, policy=QueuePolicy(), max_images=max_images)


queues = st.lists(st.tuples(st.sampled_from(KEYS), st.integers(1, 5)), max_size=20).map(lambda items: waiting(*items))
limits = st.integers(1, 6)


def test_an_empty_queue_has_no_batch() -> None:
    assert next_batch([], max_images=4) is None


def test_compatible_requests_join_the_oldest_past_others() -> None:
    one, other, _ = KEYS
    batch = next_batch(waiting((one, 1), (other, 1), (one, 2), (one, 1)), max_images=4)
    assert batch is not None
    assert batch.tickets == (0, 2, 3)
    assert batch.num_images == 4


def test_a_request_that_does_not_fit_lets_a_smaller_one_behind_it_fill_the_batch() -> None:
    key = KEYS[0]
    batch = next_batch(waiting((key, 2), (key, 3), (key, 2)), max_images=4)
    assert batch is not None
    assert batch.tickets == (0, 2)


@given(queues, limits)
def test_the_oldest_always_runs(queue: list[QueuedRequest], max_images: int) -> None:
    batch = next_batch(queue, max_images=max_images)
    assert (batch is None) == (not queue)
    if batch is not None:
        assert batch.tickets[0] == queue[0].job_id


@given(queues, limits)
def test_a_batch_shares_one_key_and_stays_within_the_limit(queue: list[QueuedRequest], max_images: int) -> None:
    batch = next_batch(queue, max_images=max_images)
    if batch is None:
        return
    chosen = [item for item in queue if item.job_id in batch.tickets]
    assert {item.key for item in chosen} == {batch.key}
    assert batch.num_images == sum(item.num_images for item in chosen)
    assert batch.num_images <= max_images or len(chosen) == 1


@given(queues, limits)
def test_nobody_waits_for_more_batches_than_there_are_requests_before_them(
    queue: list[QueuedRequest], max_images: int
) -> None:
    place = {item.job_id: index for index, item in enumerate(queue)}
    turn = 0
    while batch := next_batch(queue, max_images=max_images):
        assert all(turn <= place[job_id] for job_id in batch.tickets)
        queue = [item for item in queue if item.job_id not in batch.tickets]
        turn += 1


@given(queues, limits)
def test_whoever_could_still_join_has_joined(queue: list[QueuedRequest], max_images: int) -> None:
    batch = next_batch(queue, max_images=max_images)
    if batch is None or batch.num_images > max_images:
        return
    left = [item for item in queue if item.job_id not in batch.tickets and item.key == batch.key]
    assert all(batch.num_images + item.num_images > max_images for item in left)


def test_requests_that_differ_in_prompt_seed_and_count_alone_share_a_key() -> None:
    key = batch_key(request(), ())
    assert batch_key(request(prompt="a dog", seed=9, num_images=3, request_id="other"), ()) == key


def test_whatever_is_one_value_per_pipeline_call_keeps_requests_apart() -> None:
    base = request()
    image = PixelImage(1, 1, b"\0\0\0")
    others = [
        replace(base, width=128),
        replace(base, height=128),
        replace(base, steps=4),
        replace(base, guidance_scale=5.0),
        replace(base, scheduler="DDIMScheduler"),
        replace(base, negative_prompt=""),
        replace(base, image=image, strength=0.5),
        replace(base, image=image, strength=0.6),
    ]
    keys = {batch_key(other, ()) for other in (base, *others)} | {batch_key(base, (("digest", 1.0),))}
    assert len(keys) == len(others) + 2


def test_strength_without_an_image_means_nothing() -> None:
    assert batch_key(request(strength=0.3), ()) == batch_key(request(strength=0.9), ())


def test_a_masked_picture_never_shares_a_pass_with_a_whole_one() -> None:
    picture = request(image=PixelImage(1, 1, b"abc"), strength=1.0)
    masked = replace(picture, mask=PixelMask(1, 1, b"\xff"))
    assert batch_key(picture, ()) != batch_key(masked, ())


def test_previews_keep_no_request_from_sharing_a_pass() -> None:
    assert batch_key(request(num_previews=3), ()) == batch_key(request(), ())


def test_an_interactive_request_takes_no_batch_request_along() -> None:
    assert batch_key(request(priority="batch"), ()) != batch_key(request(), ())
