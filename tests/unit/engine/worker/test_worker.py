"""The device thread: jobs in, endings out, and nothing that reaches a neighbour."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from serve_app.core import AppliedAdapter, GenerationRequest, GenerationResult, PixelImage
from serve_app.engine.adapters.deltas import Coverage, LowRank, ParsedAdapter
from serve_app.engine.drawing.pipeline import BasePipeline
from serve_app.engine.weights.fused import FusedWeights
from serve_app.engine.worker.job import Job
from serve_app.engine.worker.worker import EngineWorker
from serve_app.errors import InternalError, OutOfBounds, ReplicaLost
from serve_app.refusals import NonFinite
from tests.engine_cases import largest_difference, on_steps, one_image, parsed_adapter, photo, request, use_of, wrap
from tests.tiny import tiny_pipeline

WAIT_S = 60.0
ONE_SCHEDULER = ("DDIMScheduler",)  # some of the others take long to make


@dataclass
class Bench:
    """A worker on a tiny base, with the live pipeline beneath it in reach."""

    live: Any
    pipeline: BasePipeline
    weights: FusedWeights
    worker: EngineWorker

    def image(self, wanted: GenerationRequest, *adapters: tuple[ParsedAdapter, float]) -> PixelImage:
        """Run one request alone."""
        return self.worker.submit(wanted, adapters).future.result(WAIT_S).images[0]


class Gate:
    """A progress listener that holds the device thread at the first step until it is opened."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self._opened = threading.Event()

    def __call__(self, step: int, steps: int) -> None:
        """Hold the pass."""
        self.reached.set()
        assert self._opened.wait(WAIT_S)

    def open(self) -> None:
        """Let the pass go on."""
        self._opened.set()


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    made = make_bench()
    yield made
    made.worker.close()


@pytest.fixture
def own_bench() -> Iterator[Bench]:
    made = make_bench()
    yield made
    made.worker.close()


def make_bench() -> Bench:
    live = tiny_pipeline("sd15")
    pipeline = wrap(live, schedulers=ONE_SCHEDULER)
    weights = FusedWeights(pipeline.components)
    return Bench(live, pipeline, weights, EngineWorker(pipeline, weights, max_batch_images=4, torch_threads=1))


def hold(bench: Bench) -> tuple[Job, Gate]:
    """Occupy the device thread with a request that nothing can share a pass with."""
    gate = Gate()
    job = bench.worker.submit(request(steps=2, prompt="the gate", width=128), (), on_event=on_steps(gate))
    assert gate.reached.wait(WAIT_S)
    return job, gate


def fused(adapter: ParsedAdapter, scale: float, wanted: GenerationRequest) -> PixelImage:
    """Return what the request gives on a base of its own with the adapter in its weights."""
    live = tiny_pipeline("sd15")
    with torch.no_grad():
        for _, name, delta in adapter.layers():
            assert isinstance(delta, LowRank)
            layer = live.unet.get_submodule(name)
            layer.weight.add_((delta.up @ delta.down) * delta.factor(scale))
    return one_image(wrap(live, schedulers=ONE_SCHEDULER), wanted)


def test_a_result_says_what_was_made_and_how(bench: Bench) -> None:
    adapter = parsed_adapter(bench.pipeline.manifest)
    wanted = request(adapters=(use_of("me/night", 0.5),), num_images=2, seed=5, prompt="cat " * 100)
    result = bench.worker.submit(wanted, [(adapter, 0.5)]).future.result(WAIT_S)
    layers = adapter.coverage.layers_matched
    assert result.adapters == (AppliedAdapter("me/night", "0123456789abcdef", 0.5, layers, layers + 1),)
    assert (result.request_id, result.base_id) == (wanted.request_id, wanted.base_id)
    assert [(image.width, image.height) for image in result.images] == [(64, 64)] * 2
    assert result.seeds == (5, 6)
    assert result.batch_size == 2
    assert result.device == "cpu"
    assert result.warnings == ("prompt truncated to 77 tokens",)
    timings = result.timings
    assert min(timings.queue_ms, timings.swap_ms, timings.denoise_ms, timings.decode_ms) > 0
    parts_ms = timings.swap_ms + timings.denoise_ms + timings.decode_ms
    assert result.compute_s * 1e3 == pytest.approx(parts_ms)


def test_steps_count_as_denoising_and_pixels_as_decoding(bench: Bench) -> None:
    def denoising_is_longer() -> bool:
        timings = bench.worker.submit(request(steps=20), ()).future.result(WAIT_S).timings
        return timings.denoise_ms > timings.decode_ms

    # One decoding may lose its core for as long as twenty steps take; not one after the other.
    assert any(denoising_is_longer() for _ in range(10))


def test_the_adapter_of_a_request_is_in_its_image_alone(bench: Bench) -> None:
    base = bench.image(request())
    for seed, scale in ((1, 1.0), (2, 0.5), (1, 0.25)):
        adapter = parsed_adapter(bench.pipeline.manifest, seed=seed)
        adapted = bench.image(request(adapters=(use_of("me/it", scale),)), (adapter, scale))
        assert adapted == fused(adapter, scale, request())
        assert adapted != base
        assert bench.image(request()) == base


def test_an_adapter_is_in_images_made_from_images_too(bench: Bench) -> None:
    adapter = parsed_adapter(bench.pipeline.manifest, seed=1)
    wanted = request(image=photo(), strength=0.8)
    plain = bench.image(wanted)
    adapted = bench.image(request(image=photo(), strength=0.8, adapters=(use_of("me/it"),)), (adapter, 1.0))
    assert adapted == fused(adapter, 1.0, wanted) != plain


def test_requests_that_wait_together_run_together(bench: Bench) -> None:
    adapter = parsed_adapter(bench.pipeline.manifest, seed=3)
    use = (use_of("me/it"),)
    wanted = [
        (request(seed=1, adapters=use), [(adapter, 1.0)]),
        (request(seed=2), []),
        (request(seed=3, num_images=2, adapters=use, prompt="a dog"), [(adapter, 1.0)]),
        (request(seed=4, adapters=(use_of("me/it", 0.5),)), [(adapter, 0.5)]),
        (request(seed=5, adapters=use), [(adapter, 1.0)]),
        (request(seed=6, num_images=6), []),
    ]
    _, gate = hold(bench)
    jobs = [bench.worker.submit(*each) for each in wanted]
    gate.open()
    results = [job.future.result(WAIT_S) for job in jobs]
    assert [result.batch_size for result in results] == [4, 1, 4, 1, 4, 6]
    for (each, adapters), result in zip(wanted, results, strict=True):
        alone = bench.image(request(prompt=each.prompt, seed=each.seed, adapters=each.adapters), *adapters)
        assert largest_difference(result.images[0], alone) <= 1


def test_submitting_never_waits_for_the_device(bench: Bench) -> None:
    holding, gate = hold(bench)
    job = bench.worker.submit(request(), ())
    state = bench.worker.snapshot()
    assert (state.waiting, state.running, state.is_alive) == (1, 1, True)
    assert not holding.future.done()
    gate.open()
    job.future.result(WAIT_S)
    state = bench.worker.snapshot()
    assert (state.waiting, state.running, state.applied) == (0, 0, ())


def test_progress_reaches_each_job_of_a_pass(bench: Bench) -> None:
    heard: dict[int, list[tuple[int, int]]] = {0: [], 1: []}

    def listener(index: int) -> Callable[[int, int], None]:
        return lambda step, steps: heard[index].append((step, steps))

    _, gate = hold(bench)
    jobs = [bench.worker.submit(request(seed=seed), (), on_event=on_steps(listener(seed))) for seed in heard]
    gate.open()
    for job in jobs:
        job.future.result(WAIT_S)
    assert heard == {0: [(1, 3), (2, 3), (3, 3)], 1: [(1, 3), (2, 3), (3, 3)]}


def test_a_listener_that_fails_costs_its_job_nothing(bench: Bench) -> None:
    def fail(step: int, steps: int) -> None:
        raise ValueError("the caller has gone")

    job = bench.worker.submit(request(), (), on_event=on_steps(fail))
    assert job.future.result(WAIT_S).images[0] == bench.image(request())


def test_a_job_cancelled_in_the_queue_never_runs(bench: Bench) -> None:
    heard: list[int] = []
    _, gate = hold(bench)
    job = bench.worker.submit(request(), (), on_event=on_steps(lambda step, _: heard.append(step)))
    assert job.cancel()
    assert bench.worker.snapshot().waiting == 0
    gate.open()
    bench.image(request())
    with pytest.raises(CancelledError):
        job.future.result(WAIT_S)
    assert heard == []


def test_a_job_cancelled_in_the_queue_lets_its_adapters_go_at_once(bench: Bench) -> None:
    gate = Gate()
    holding = bench.worker.submit(request(), (), on_event=on_steps(gate))
    assert gate.reached.wait(WAIT_S)
    adapter = parsed_adapter(bench.pipeline.manifest)
    kept = weakref.ref(next(adapter.tensors()))
    assert bench.worker.submit(request(adapters=(use_of("me/a"),)), [(adapter, 1.0)]).cancel()
    del adapter
    gc.collect()
    assert kept() is None
    gate.open()
    holding.future.result(WAIT_S)


def test_a_running_job_that_is_cancelled_stops_at_the_next_step_and_leaves_no_trace(bench: Bench) -> None:
    steps_run: list[int] = []
    hook = bench.live.unet.register_forward_hook(lambda *_: steps_run.append(1))
    jobs: list[Job] = []
    _, gate = hold(bench)
    steps_run.clear()

    def cancel_at_second(step: int, steps: int) -> None:
        if step == 2:
            jobs[0].cancel()

    adapter = parsed_adapter(bench.pipeline.manifest, seed=4)
    wanted = request(steps=40, adapters=(use_of("me/it"),))
    jobs.append(bench.worker.submit(wanted, [(adapter, 1.0)], on_event=on_steps(cancel_at_second)))
    held_steps = 1  # the holding pass still has one to run
    gate.open()
    with pytest.raises(CancelledError):
        jobs[0].future.result(WAIT_S)
    after = bench.image(request())
    hook.remove()
    assert len(steps_run) == held_steps + 3 + request().steps
    assert after == one_image(bench.pipeline, request())


def test_when_one_of_a_pass_is_cancelled_the_others_go_on(bench: Bench) -> None:
    jobs: list[Job] = []
    _, gate = hold(bench)
    jobs.append(bench.worker.submit(request(seed=1), (), on_event=on_steps(lambda *_: jobs[0].cancel())))
    jobs.append(bench.worker.submit(request(seed=2), ()))
    gate.open()
    assert jobs[1].future.result(WAIT_S).batch_size == 2
    assert jobs[0].future.cancelled()


def test_a_crash_reaches_only_the_jobs_of_its_batch(own_bench: Bench) -> None:
    before = own_bench.image(request())

    def break_down(*_: Any) -> None:
        raise RuntimeError("no memory left")

    _, gate = hold(own_bench)
    poisoned = own_bench.worker.submit(request(request_id="request-8", steps=2), ())
    hook = own_bench.live.unet.register_forward_hook(break_down)
    gate.open()
    with pytest.raises(InternalError, match="request-8"):
        poisoned.future.result(WAIT_S)
    assert own_bench.worker.snapshot().failed_batches > 0
    hook.remove()
    assert own_bench.image(request()) == before
    assert own_bench.worker.snapshot().failed_batches == 0


def test_an_adapter_that_cannot_be_applied_fails_only_its_own_request(bench: Bench) -> None:
    before, checksum = bench.image(request()), bench.weights.checksum()
    sound = parsed_adapter(bench.pipeline.manifest, seed=5)
    layers = dict(sound.components["unet"])
    layers["no.such.layer"] = next(iter(layers.values()))
    broken = ParsedAdapter("broken", {"unet": layers}, Coverage(1, 1))
    _, gate = hold(bench)
    bad = bench.worker.submit(request(adapters=(use_of("me/bad"),)), [(broken, 1.0)])
    good = bench.worker.submit(request(), ())
    gate.open()
    with pytest.raises(InternalError):
        bad.future.result(WAIT_S)
    assert good.future.result(WAIT_S).images[0] == before
    assert bench.weights.checksum() == checksum


def test_an_adapter_that_overflows_is_named_and_leaves_no_trace(bench: Bench) -> None:
    before = bench.image(request())
    adapter = parsed_adapter(bench.pipeline.manifest, seed=6)
    scale = 1e38
    job = bench.worker.submit(request(adapters=(use_of("me/loud", scale),)), [(adapter, scale)])
    with pytest.raises(NonFinite, match="me/loud at scale 1e"):
        job.future.result(WAIT_S)
    assert bench.image(request()) == before


def test_what_the_base_cannot_do_is_refused_before_the_queue(bench: Bench) -> None:
    with pytest.raises(OutOfBounds):
        bench.worker.submit(request(seed=-1), ())


def test_the_device_thread_computes_with_the_threads_it_is_given() -> None:
    pipeline = wrap(tiny_pipeline("sd15"), schedulers=ONE_SCHEDULER)
    for threads in (2, 1):
        worker = EngineWorker(pipeline, FusedWeights(pipeline.components), max_batch_images=1, torch_threads=threads)
        heard: list[int] = []
        worker.submit(
            request(steps=1), (), on_event=on_steps(lambda *_, heard=heard: heard.append(torch.get_num_threads()))
        ).future.result(WAIT_S)
        worker.close()
        assert heard == [threads]


def test_a_worker_keeps_nothing_of_a_request_that_has_ended(own_bench: Bench) -> None:
    adapter = parsed_adapter(own_bench.pipeline.manifest, seed=7)
    layers = iter(adapter.components["unet"].values())
    delta = next(layers)
    assert isinstance(delta, LowRank)
    tensor = weakref.ref(delta.down)
    job = own_bench.worker.submit(request(adapters=(use_of("me/it"),)), [(adapter, 1.0)])
    job.future.result(WAIT_S)
    own_bench.image(request())
    del adapter, layers, delta, job
    gc.collect()
    assert tensor() is None


def test_closing_fails_what_waits_and_stops_what_runs(own_bench: Bench) -> None:
    running, gate = hold(own_bench)
    waiting = own_bench.worker.submit(request(), ())
    closing = threading.Thread(target=own_bench.worker.close)
    closing.start()
    while own_bench.worker.snapshot().is_alive:
        pass
    gate.open()
    closing.join(WAIT_S)
    assert not closing.is_alive()
    for job in (running, waiting):
        with pytest.raises(ReplicaLost):
            job.future.result(0)


def test_closing_with_draining_finishes_what_was_accepted(own_bench: Bench) -> None:
    running, gate = hold(own_bench)
    waiting = [own_bench.worker.submit(request(steps=steps), ()) for steps in (1, 2)]
    closing = threading.Thread(target=own_bench.worker.close, kwargs={"is_draining": True})
    closing.start()
    gate.open()
    closing.join(WAIT_S)
    results = [job.future.result(0) for job in (running, *waiting)]
    assert all(isinstance(result, GenerationResult) for result in results)


def test_a_closed_worker_takes_nothing(own_bench: Bench) -> None:
    own_bench.worker.close()
    own_bench.worker.close()
    assert not own_bench.worker.snapshot().is_alive
    with pytest.raises(ReplicaLost):
        own_bench.worker.submit(request(), ())
