"""The worker prepares the next adapters while a batch runs, and binds only what is asked for then."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from serve_app.core import PixelImage
from serve_app.engine.adapters.deltas import Coverage, LowRank, ParsedAdapter
from serve_app.engine.drawing.pipeline import BasePipeline
from serve_app.engine.weights.fused import FusedWeights
from serve_app.engine.weights.prefetch import SwapPrefetcher
from serve_app.engine.worker.job import Job
from serve_app.engine.worker.scheduling import QueuePolicy
from serve_app.engine.worker.worker import EngineWorker
from serve_app.errors import InternalError
from tests.engine_cases import on_steps, parsed_adapter, request, use_of, wrap
from tests.tiny import tiny_pipeline

WAIT_S = 60.0


class Bench:
    """A worker that prepares ahead, on a tiny base."""

    def __init__(self) -> None:
        self.live: Any = tiny_pipeline("sd15")
        self.pipeline: BasePipeline = wrap(self.live, schedulers=("DDIMScheduler",))
        self.weights = FusedWeights(self.pipeline.components)
        self.worker = EngineWorker(
            self.pipeline,
            self.weights,
            max_batch_images=1,
            torch_threads=1,
            prefetches_swap=True,
            policy=QueuePolicy(max_overtakes=0),
        )
        self.adapters = [parsed_adapter(self.pipeline.manifest, seed=seed) for seed in range(3)]

    def submit(self, index: int | None, on_step: Callable[[int, int], None] | None = None, **changes: Any) -> Job:
        on_event = None if on_step is None else on_steps(on_step)
        if index is None:
            return self.worker.submit(request(**changes), (), on_event=on_event)
        wanted = request(adapters=(use_of(f"me/{index}"),), **changes)
        return self.worker.submit(wanted, [(self.adapters[index], 1.0)], on_event=on_event)

    def hold(self, index: int | None = None) -> tuple[Job, Callable[[], None]]:
        """Hold the device thread in the first step of a long batch; return its job and what lets it go on."""
        reached, opened = threading.Event(), threading.Event()

        def stop(step: int, steps: int) -> None:
            reached.set()
            assert opened.wait(WAIT_S)

        job = self.submit(index, on_step=stop, prompt="the gate")
        assert reached.wait(WAIT_S)
        return job, opened.set


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.worker.close()


def plain(index: int | None) -> PixelImage:
    """Return the image of a base that prepares nothing."""
    pipeline = wrap(tiny_pipeline("sd15"), schedulers=("DDIMScheduler",))
    worker = EngineWorker(pipeline, FusedWeights(pipeline.components), max_batch_images=1, torch_threads=1)
    adapters = [] if index is None else [(parsed_adapter(pipeline.manifest, seed=index), 1.0)]
    uses = () if index is None else (use_of(f"me/{index}"),)
    image = worker.submit(request(adapters=uses), adapters).future.result(WAIT_S).images[0]
    worker.close()
    return image


def test_what_waits_is_prepared_while_a_batch_runs_and_gives_the_same_image(bench: Bench) -> None:
    _, go_on = bench.hold(0)
    jobs = [bench.submit(index) for index in (1, 2, None, 0)]
    go_on()
    images = [job.future.result(WAIT_S).images[0] for job in jobs]
    assert images == [plain(index) for index in (1, 2, None, 0)]
    assert bench.worker.snapshot().prepared == 3  # the base needs no preparing


def test_a_job_cancelled_after_it_was_prepared_changes_nothing(bench: Bench) -> None:
    first, go_on = bench.hold(0)
    unwanted = bench.submit(1, num_images=1)
    cancelled = threading.Event()

    def cancel(step: int, steps: int) -> None:
        if step == 2:
            unwanted.cancel()
            cancelled.set()

    first.on_event = on_steps(cancel)
    after = bench.submit(2)
    go_on()
    assert after.future.result(WAIT_S).images[0] == plain(2)
    assert cancelled.is_set()
    assert unwanted.future.cancelled()


def test_an_adapter_that_cannot_be_prepared_fails_its_own_request_alone(bench: Bench) -> None:
    sound = bench.adapters[0]
    strange = LowRank(torch.ones(1, 3), torch.ones(3, 1), 1.0, 1.0)
    layers = {**sound.components["unet"], "no.such.layer": strange}
    broken = ParsedAdapter("broken", {"unet": layers}, Coverage(1, 1))
    _, go_on = bench.hold(0)
    bad = bench.worker.submit(request(adapters=(use_of("me/bad"),)), [(broken, 1.0)])
    good = bench.submit(1)
    go_on()
    with pytest.raises(InternalError):
        bad.future.result(WAIT_S)
    assert good.future.result(WAIT_S).images[0] == plain(1)


def test_preparing_the_same_again_does_nothing_and_something_else_is_not_bound(bench: Bench) -> None:
    components = wrap(tiny_pipeline("sd15")).components
    weights = FusedWeights(components)
    prefetcher = SwapPrefetcher(weights, torch_threads=1)
    first, second, third = ([(adapter, 1.0)] for adapter in bench.adapters)
    prefetcher.apply(first)
    prefetcher.prepare(second)
    prefetcher.prepare(second)
    prefetcher.apply(third)
    assert (weights.applied[0][0], prefetcher.bound) == ("digest-2", 0)
    prefetcher.prepare(first)
    prefetcher.apply(first)
    assert (weights.applied[0][0], prefetcher.bound) == ("digest-0", 1)
    prefetcher.prepare(first)  # applied already
    prefetcher.apply([])
    assert (weights.applied, prefetcher.bound) == ((), 1)
    prefetcher.close()


def test_a_device_without_room_for_second_buffers_goes_on_without(bench: Bench) -> None:
    class Narrow(FusedWeights):
        def prepare(self, composition: Any) -> Any:
            raise torch.OutOfMemoryError("no room")

    weights = Narrow(wrap(tiny_pipeline("sd15")).components)
    prefetcher = SwapPrefetcher(weights, torch_threads=1)
    for adapter in bench.adapters:
        prefetcher.prepare([(adapter, 1.0)])
        prefetcher.apply([(adapter, 1.0)])
        assert weights.applied == ((adapter.digest, 1.0),)
    assert prefetcher.bound == 0
    prefetcher.close()
