"""Whoever leaves frees the device at the next step and is in nobody else's image; proved by counting steps."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError
from typing import Any

import pytest

from serve_app.core import GenerationRequest, PixelImage
from serve_app.engine.weights.fused import FusedWeights
from serve_app.engine.worker.job import Job
from serve_app.engine.worker.worker import EngineWorker
from tests.engine_cases import on_steps, one_image, parsed_adapter, request, use_of, wrap
from tests.tiny import tiny_pipeline

WAIT_S = 120.0
STEPS = 4


class Counted:
    """A worker on a tiny base that counts how often the denoiser runs."""

    def __init__(self, max_batch_images: int) -> None:
        live = tiny_pipeline("sd15")
        self.pipeline = wrap(live, schedulers=("DDIMScheduler",))
        self.weights = FusedWeights(self.pipeline.components)
        self.worker = EngineWorker(self.pipeline, self.weights, max_batch_images=max_batch_images, torch_threads=1)
        self.passes = 0
        live.unet.register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.passes += 1

    def hold(self) -> tuple[Job, threading.Event]:
        """Occupy the device until the event is set, with a request of one step that nothing can join."""
        is_open, is_reached = threading.Event(), threading.Event()

        def wait(step: int, steps: int) -> None:
            is_reached.set()
            assert is_open.wait(WAIT_S)

        job = self.worker.submit(request(steps=1, width=128), (), on_event=on_steps(wait))
        assert is_reached.wait(WAIT_S)
        self.passes = 0
        return job, is_open


@pytest.fixture
def alone() -> Iterator[Counted]:
    """One image at a time: its bits are those of the image alone."""
    counted = Counted(max_batch_images=1)
    yield counted
    counted.worker.close()


@pytest.fixture
def shared() -> Iterator[Counted]:
    counted = Counted(max_batch_images=4)
    yield counted
    counted.worker.close()


@pytest.mark.slow
def test_half_of_forty_leave_and_the_other_half_get_their_images(alone: Counted) -> None:
    adapter = parsed_adapter(alone.pipeline.manifest, seed=1)

    def wanted(index: int) -> GenerationRequest:
        uses = (use_of("me/it", 0.5),) if index % 3 == 0 else ()
        return request(steps=STEPS, seed=index % 7, adapters=uses)

    leaving = set(random.Random(0).sample(range(40), 20))
    queued = set(random.Random(1).sample(sorted(leaving), 10))
    _, is_open = alone.hold()
    jobs: list[Job] = []

    def leave_at_first_step(index: int) -> Any:
        return lambda step, _: jobs[index].cancel() if step == 1 else None

    for index in range(40):
        adapters = [(adapter, 0.5)] if index % 3 == 0 else []
        listener = leave_at_first_step(index) if index in leaving - queued else lambda *_: None
        jobs.append(alone.worker.submit(wanted(index), adapters, on_event=on_steps(listener)))
    for index in queued:
        assert jobs[index].cancel()
    assert alone.worker.snapshot().waiting == 30
    is_open.set()
    survivors = sorted(set(range(40)) - leaving)
    images = {index: jobs[index].future.result(WAIT_S).images[0] for index in survivors}
    while (state := alone.worker.snapshot()).running or state.waiting:
        pass
    # Those who leave while they run cost the step in which they leave and the one that notices.
    assert alone.passes == 20 * STEPS + 10 * 2
    for index in leaving:
        with pytest.raises(CancelledError):
            jobs[index].future.result(0)
    references: dict[tuple[int, bool], PixelImage] = {}
    for index in survivors:
        key = (index % 7, index % 3 == 0)
        if key not in references:
            alone.weights.apply([(adapter, 0.5)] if key[1] else [])
            references[key] = one_image(alone.pipeline, wanted(index))
        assert images[index] == references[key]


def test_leaving_a_shared_pass_changes_no_bit_of_the_others(shared: Counted) -> None:
    def run(leaving: set[int]) -> dict[int, PixelImage]:
        _, is_open = shared.hold()
        jobs: list[Job] = []
        for seed in range(4):

            def listener(step: int, _: int, seed: int = seed) -> None:
                if step == 2 and seed in leaving:
                    jobs[seed].cancel()

            jobs.append(shared.worker.submit(request(steps=STEPS, seed=seed), (), on_event=on_steps(listener)))
        is_open.set()
        return {seed: jobs[seed].future.result(WAIT_S).images[0] for seed in range(4) if seed not in leaving}

    together = run(set())
    assert run({0, 2}) == {seed: together[seed] for seed in (1, 3)}


def test_a_shared_pass_that_all_have_left_stops(shared: Counted) -> None:
    _, is_open = shared.hold()
    jobs: list[Job] = []

    def leave_one_by_one(step: int, _: int) -> None:
        jobs[step - 1].cancel()

    jobs.append(shared.worker.submit(request(steps=40, seed=0), ()))
    jobs.append(shared.worker.submit(request(steps=40, seed=1), ()))
    jobs.append(shared.worker.submit(request(steps=40, seed=2), (), on_event=on_steps(leave_one_by_one)))
    is_open.set()
    after = shared.worker.submit(request(steps=1), ())
    after.future.result(WAIT_S)
    assert shared.passes == 4 + 1
