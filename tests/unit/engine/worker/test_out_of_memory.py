"""Where memory runs out, requests are tried once more by themselves; the base is whole and serves on.

The memory that runs out is the CPU's: a hook in the live pipeline asks torch's own allocator for more than there is.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from serve_app.core import GenerationRequest, PixelImage
from serve_app.deployments.replica.health import MAX_FAILED_BATCHES, diagnose
from serve_app.engine.adapters.deltas import LowRank, ParsedAdapter
from serve_app.engine.weights.fused import FusedWeights
from serve_app.engine.weights.prefetch import SwapPrefetcher
from serve_app.engine.weights.shortage import is_out_of_memory
from serve_app.engine.worker.device_health import is_fatal
from serve_app.engine.worker.job import Job
from serve_app.engine.worker.memory import RECOVERY_S
from serve_app.engine.worker.worker import EngineWorker
from serve_app.errors import OutOfMemory
from tests.engine_cases import on_steps, parsed_adapter, photo, request, use_of, wrap
from tests.tiny import tiny_pipeline

WAIT_S = 60.0
AN_HOUR_S = 3600.0


def take_too_much() -> None:
    """Ask for more memory than any machine has."""
    torch.empty(1 << 60, dtype=torch.uint8)


class Bench:
    """A worker on a tiny base, in whose parts memory can be made to run out; its clock is the test's."""

    def __init__(self) -> None:
        self.live: Any = tiny_pipeline("sd15")
        self.pipeline = wrap(self.live, schedulers=("DDIMScheduler",))
        self.weights = FusedWeights(self.pipeline.components)
        self.now_s = 0.0
        self.worker = EngineWorker(
            self.pipeline, self.weights, max_batch_images=4, torch_threads=1, clock=lambda: self.now_s
        )
        self._hooks: list[Any] = []

    def before(self, module: nn.Module, hook: Callable[[int], None]) -> None:
        """Call `hook` with the images in the pass whenever a module is about to run."""

        def call(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rows = args[0] if args else kwargs["input_ids"]
            hook(len(rows) // 2 if module is self.live.unet else len(rows))

        self._hooks.append(module.register_forward_pre_hook(call, with_kwargs=True))

    def at_most(self, images: int) -> list[int]:
        """Let the denoiser have room for so many images; return the list of what it is asked to draw."""
        asked: list[int] = []

        def hook(count: int) -> None:
            asked.append(count)
            if count > images:
                take_too_much()

        self.before(self.live.unet, hook)
        return asked

    def mend(self) -> None:
        """Give all memory back, and let the limits be forgotten."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.now_s += AN_HOUR_S

    def submit(self, wanted: GenerationRequest, *adapters: tuple[ParsedAdapter, float]) -> Job:
        return self.worker.submit(wanted, adapters)

    def image(self, wanted: GenerationRequest, *adapters: tuple[ParsedAdapter, float]) -> PixelImage:
        return self.submit(wanted, *adapters).future.result(WAIT_S).images[0]

    def together(self, *wanted: GenerationRequest, failing: Callable[[int], None] = lambda _: None) -> list[Job]:
        """Have requests wait behind another, so that they share a pass; `failing` is before their denoiser alone."""
        opened, reached = threading.Event(), threading.Event()

        def hold(step: int, steps: int) -> None:
            reached.set()
            assert opened.wait(WAIT_S)

        self.worker.submit(request(width=128, steps=1), (), on_event=on_steps(hold))
        assert reached.wait(WAIT_S)
        self.before(self.live.unet, failing)
        jobs = [self.submit(one) for one in wanted]
        opened.set()
        return jobs


@pytest.fixture(scope="module")
def shared() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.worker.close()


@pytest.fixture
def bench(shared: Bench) -> Iterator[Bench]:
    shared.mend()
    checksum = shared.weights.checksum()
    reference = shared.image(request(seed=99))
    yield shared
    shared.mend()
    assert shared.image(request(seed=99)) == reference
    assert shared.weights.checksum() == checksum
    assert diagnose(shared.worker.snapshot(), "tiny/base") is None


def test_requests_that_have_no_room_together_are_drawn_one_by_one_as_if_each_were_alone(bench: Bench) -> None:
    wanted = [request(seed=1), request(seed=2, num_images=2, prompt="a dog"), request(seed=4)]
    alone = [bench.submit(one).future.result(WAIT_S) for one in (wanted[0], wanted[2])]
    dogs = [bench.image(replace(wanted[1], num_images=1, seed=seed)) for seed in (2, 3)]
    before = bench.worker.snapshot().shortages
    bench.at_most(1)
    first, both, last = (job.future.result(WAIT_S) for job in bench.together(*wanted))
    assert [first.images, last.images] == [result.images for result in alone]
    assert list(both.images) == dogs
    assert (both.seeds, both.batch_size, first.batch_size) == ((2, 3), 1, 1)
    after = bench.worker.snapshot().shortages
    assert (after.recovered - before.recovered, after.refused - before.refused) == (1, 0)


def test_the_next_passes_are_smaller_until_the_limit_is_forgotten(bench: Bench) -> None:
    asked = bench.at_most(2)
    wanted = request(num_images=4, steps=1)
    passes = []
    for _ in range(3):
        asked.clear()
        bench.submit(wanted).future.result(WAIT_S)
        passes.append(list(asked))
        bench.now_s += RECOVERY_S / 2
    assert passes == [[4, 1, 1, 1, 1], [2, 2], [4, 1, 1, 1, 1]]


def test_a_request_alone_is_tried_once_more_when_memory_was_freed(bench: Bench) -> None:
    plain, failures = bench.image(request()), [1]
    progress: list[int] = []
    bench.before(bench.live.unet, lambda _: failures.pop() and take_too_much() if failures else None)
    job = bench.worker.submit(request(), (), on_event=lambda event: progress.append(getattr(event, "step", 0)))
    assert job.future.result(WAIT_S).images == (plain,)
    assert progress == [0, 1, 2, 3]


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae.decoder", "vae.encoder"])
def test_wherever_memory_runs_out_for_good_the_caller_is_told_what_to_do(bench: Bench, part: str) -> None:
    bench.before(_part(bench.live, part), lambda _: take_too_much())
    wanted = request(num_images=2, image=photo(), strength=0.9)
    with pytest.raises(OutOfMemory) as caught:
        bench.submit(wanted).future.result(WAIT_S)
    assert str(caught.value) == (
        "tiny/base has no memory left for 2 images of 64x64; "
        "ask for a smaller size or fewer images, or try again in 10 s"
    )
    assert (caught.value.status, caught.value.code, caught.value.retry_after) == (503, "out_of_memory", True)


def test_who_shares_the_pass_of_one_that_has_no_room_gets_its_images(bench: Bench) -> None:
    wanted = [request(seed=1), request(seed=2, prompt="a dog"), request(seed=3)]
    alone = [bench.image(one) for one in wanted]
    calls: list[int] = []

    def fail_the_second(images: int) -> None:
        calls.append(images)
        if len(calls) in (1, 5):  # the first step of all three, then after the three of the first that of the second
            take_too_much()

    first, second, third = bench.together(*wanted, failing=fail_the_second)
    assert first.future.result(WAIT_S).images == (alone[0],)
    with pytest.raises(OutOfMemory):
        second.future.result(WAIT_S)
    assert third.future.result(WAIT_S).images == (alone[2],)


def test_adapters_that_have_no_room_are_refused_and_the_base_is_bound_again(bench: Bench) -> None:
    sound = parsed_adapter(bench.pipeline.manifest, seed=1)
    adapted = bench.image(request(adapters=(use_of("me/fine"),)), (sound, 1.0))
    name, delta = next(iter(sound.components["unet"].items()))
    assert isinstance(delta, LowRank)
    # A product over so many ranks has no room, wherever it begins.
    huge = LowRank(delta.down[:1].expand(1 << 40, -1), delta.up[:, :1].expand(-1, 1 << 40), 1.0, 1.0)
    components = {"unet": {**sound.components["unet"], name: huge}}
    with pytest.raises(OutOfMemory, match="no memory left for me/huge; ask for fewer adapters or a smaller one"):
        bench.image(request(adapters=(use_of("me/huge"),)), (replace(sound, digest="huge", components=components), 1.0))
    assert bench.worker.snapshot().applied == ()
    assert bench.image(request(adapters=(use_of("me/fine"),)), (sound, 1.0)) == adapted


def test_a_device_without_room_for_the_base_s_own_size_again_and_again_is_unwell(bench: Bench) -> None:
    bench.at_most(0)
    for _ in range(MAX_FAILED_BATCHES):
        with pytest.raises(OutOfMemory):
            bench.image(request())
    found = diagnose(bench.worker.snapshot(), "tiny/base")
    assert found is not None
    assert found.can_serve


def test_a_decoder_that_was_left_between_two_dtypes_is_made_whole(bench: Bench) -> None:
    bench.live.vae.to(dtype=torch.float64)
    bench.pipeline.restore_dtypes()
    assert {parameter.dtype for parameter in bench.live.vae.parameters()} == {torch.float32}


def test_nothing_is_prepared_ahead_while_memory_is_short(bench: Bench) -> None:
    weights = FusedWeights({"unet": tiny_pipeline("sd15").unet})
    prefetcher = SwapPrefetcher(weights)
    composition = [(parsed_adapter(bench.pipeline.manifest), 1.0)]
    prefetcher.pause()
    prefetcher.prepare(composition)
    prefetcher.apply(composition)
    assert prefetcher.bound == 0
    weights.apply(())
    prefetcher.resume()
    prefetcher.prepare(composition)
    prefetcher.apply(composition)
    assert prefetcher.bound == 1
    prefetcher.close()


def test_errors_are_told_apart_by_what_they_say() -> None:
    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), MemoryError()):
        assert is_out_of_memory(error)
    with pytest.raises(RuntimeError) as caught:
        take_too_much()
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.AcceleratorError("CUDA error: out of memory"))
    for text in ("an illegal memory access was encountered", "device-side assert triggered", "uncorrectable ECC error"):
        broken = torch.AcceleratorError(f"CUDA error: {text}")
        assert is_fatal(broken)
        assert not is_out_of_memory(broken)
    for other in (RuntimeError("shapes do not match"), ValueError("out of memory")):
        assert not is_out_of_memory(other)
        assert not is_fatal(other)


LIMITED = """
import resource, sys
import torch
from tests.engine_cases import request
from tests.unit.engine.worker.test_out_of_memory import Bench

bench = Bench()
image = bench.image(request(steps=1))
taken = [int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize")][0] << 10
scratch = 256 << 20


def take(images):  # what a larger denoiser would take for each image
    torch.empty(images * scratch, dtype=torch.uint8)


bench.before(bench.live.unet, take)
resource.setrlimit(resource.RLIMIT_AS, (taken + 2 * scratch, resource.RLIM_INFINITY))
result = bench.submit(request(steps=1, num_images=4)).future.result(60)
assert result.images[0] == image, "another image"
assert bench.worker.snapshot().shortages.recovered == 1
bench.worker.close()
print(len(result.images), result.batch_size)
"""


@pytest.mark.slow
def test_a_process_at_the_limit_of_its_memory_draws_all_the_same() -> None:
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, timeout=280)
    assert done.stdout == "4 1\n", done.stderr


def _part(live: Any, path: str) -> nn.Module:
    found = live
    for name in path.split("."):
        found = getattr(found, name)
    return found
