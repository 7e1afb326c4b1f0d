"""Runs that take turns on one device: each image is the one that its request gets alone, whatever happens between."""

from __future__ import annotations

import random
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import CancelledError
from dataclasses import replace
from typing import Any

import pytest
import torch

from serve_app.core import GenerationRequest, GenerationResult, GivenBack, Progress, WallClockDeadline
from serve_app.engine.adapters.deltas import ParsedAdapter
from serve_app.engine.weights.fused import FusedWeights
from serve_app.engine.worker.job import Job
from serve_app.engine.worker.turns import SharingPolicy
from serve_app.engine.worker.worker import EngineWorker
from serve_app.errors import DeadlineExceeded, InternalError, OutOfMemory, ReplicaLost
from tests.any_turn import AnyTurn
from tests.engine_cases import largest_difference, on_steps, parsed_adapter, photo, request, use_of, wrap
from tests.tiny import FAMILIES, tiny_pipeline
from tests.tiny_families.build import tiny_family

WAIT_S = 120.0
YEAR_2030 = 1_900_000_000.0


class Bench:
    """A worker on a tiny base whose runs take turns."""

    def __init__(self, family: str = "sd15", **settings: Any) -> None:
        self.live: Any = tiny_pipeline(family) if family in FAMILIES else tiny_family(family)
        self.pipeline = wrap(self.live, schedulers=())
        self.weights = FusedWeights(self.pipeline.components)
        self.adapters = [parsed_adapter(self.pipeline.manifest, seed=seed) for seed in range(3)]
        self.later_s = 0.0
        self.worker = EngineWorker(
            self.pipeline, self.weights, torch_threads=1,
            clock=lambda: time.perf_counter() + self.later_s, wall_clock=lambda: YEAR_2030,
            **{"max_batch_images": 2, "sharing": SharingPolicy(), **settings},
        )  # fmt: skip

    def submit(self, wanted: GenerationRequest, on_event: Any = None) -> Job:
        return self.worker.submit(wanted, [self._adapter(use) for use in wanted.adapters], on_event=on_event)

    def alone(self, wanted: GenerationRequest) -> GenerationResult:
        return self.submit(wanted).future.result(WAIT_S)

    def hold(self, **changes: Any) -> tuple[Job, threading.Event]:
        """Hold the device in the first step of a request; return its job and what lets it go on."""
        reached, opened = threading.Event(), threading.Event()

        def stop(*_: int) -> None:
            reached.set()
            assert opened.wait(WAIT_S)

        job = self.submit(request(**{"prompt": "the gate", "steps": 30, **changes}), on_steps(stop))
        assert reached.wait(WAIT_S)
        return job, opened

    def _adapter(self, use: Any) -> tuple[ParsedAdapter, float]:
        return self.adapters[int(use.spec.id[-1])], use.scale


def drawn(rng: random.Random, number: int, *, can_take_images: bool) -> GenerationRequest:
    """Return any request."""
    adapter = rng.choice([None, 0, 1, 2])
    more: dict[str, Any] = {}
    if can_take_images and rng.random() < 0.3:
        more = {"image": photo(), "strength": 0.8}
    return request(
        request_id=f"request-{number}",
        adapters=() if adapter is None else (use_of(f"me/{adapter}", rng.choice([1.0, 0.5])),),
        steps=rng.choice([2, 3, 4]), num_images=rng.choice([1, 1, 2]), seed=rng.randrange(100),
        guidance_scale=rng.choice([1.0, 4.0]), prompt=rng.choice(["a photo of a cat", "red pixel art"]),
        width=rng.choice([64, 64, 96]) if not more else 64, num_previews=rng.choice([0, 2]), **more,
    )  # fmt: skip


@pytest.mark.parametrize(
    "family", ["sd15", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sdxl", "sd3", "flux", "qwen_image"))]
)
def test_runs_that_change_at_random_steps_amid_failures_each_draw_what_they_draw_alone(family: str) -> None:
    rng = random.Random(family)
    can_take_images = family in ("sd15", "sdxl")
    wanted = [drawn(rng, number, can_take_images=can_take_images) for number in range(10)]
    plain = Bench(family, sharing=None)
    references = [plain.alone(one) for one in wanted]
    checksum = plain.weights.checksum()
    plain.worker.close()

    turns = AnyTurn(1)
    bench = Bench(family, choose=turns, sharing=SharingPolicy(max_in_progress=4))
    chances, denoiser = random.Random(2), bench.live.components.get("unet") or bench.live.transformer

    def fail_by_chance(*_: Any) -> None:
        chance = chances.random()
        if chance < 0.03:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if chance < 0.05:
            raise RuntimeError("broken")

    denoiser.register_forward_pre_hook(fail_by_chance)
    jobs: list[Job] = []

    def listener(number: int) -> Any:
        return on_steps(lambda step, _: step == 2 and number % 4 == 3 and jobs[number].cancel())

    _, opened = bench.hold(steps=2)
    for number, one in enumerate(wanted):
        jobs.append(bench.submit(one, listener(number)))
    opened.set()
    answered = 0
    for job, reference in zip(jobs, references, strict=True):
        try:
            result = job.future.result(WAIT_S)
        except (CancelledError, InternalError, OutOfMemory):
            continue
        answered += 1
        allowed = 0 if result.batch_size == reference.batch_size == job.request.num_images else 1
        for image, expected in zip(result.images, reference.images, strict=True):
            assert largest_difference(image, expected) <= allowed
    bench.worker.close(is_draining=True)  # a cancelled job runs to the end of its step
    assert answered >= 4
    assert bench.weights.checksum() == checksum
    assert turns.most_begun == 4
    assert bench.worker.snapshot().running == 0


def test_a_short_request_overtakes_a_long_one_that_has_begun_and_changes_no_bit_of_it() -> None:
    bench = Bench()
    long = {"adapters": (use_of("me/0"),), "num_previews": 2}
    expected = bench.alone(request(prompt="the gate", steps=30, **long))
    events: list[Progress] = []
    ended: list[str] = []
    held, opened = bench.hold(**long)
    held.on_event = lambda event: events.append(event) if isinstance(event, Progress) else None
    short = bench.submit(request(steps=2, adapters=(use_of("me/1"),)))
    for name, job in (("long", held), ("short", short)):
        job.future.add_done_callback(lambda _, name=name: ended.append(name))
    opened.set()
    result = held.future.result(WAIT_S)
    assert ended == ["short", "long"]
    assert result.images == expected.images
    assert short.future.result(0).images == bench.alone(short.request).images
    assert result.timings.suspended_ms > 0 == short.future.result(0).timings.suspended_ms
    assert result.timings.denoise_ms > 0
    assert [(event.queue_position, event.step) for event in events][:2] == [(1, 1), (0, 2)]
    assert not bench.worker.snapshot().running
    bench.worker.close()


def test_without_sharing_a_run_keeps_the_device_to_its_end() -> None:
    bench = Bench(sharing=None)
    ended: list[str] = []
    held, opened = bench.hold()
    short = bench.submit(request(steps=2))
    for name, job in (("long", held), ("short", short)):
        job.future.add_done_callback(lambda _, name=name: ended.append(name))
    opened.set()
    short.future.result(WAIT_S)
    assert ended == ["long", "short"]
    bench.worker.close()


def test_a_caller_with_many_requests_leaves_another_half_of_the_device() -> None:
    bench = Bench()
    bench.worker.close()
    steps = [0.0]
    worker = bench.worker = EngineWorker(
        bench.pipeline, bench.weights, max_batch_images=1, torch_threads=1, sharing=SharingPolicy(),
        clock=lambda: steps[0],
    )  # fmt: skip

    def tick(*_: Any) -> None:
        steps[0] += 1

    bench.live.unet.register_forward_pre_hook(tick)
    ended: list[str] = []
    held, opened = bench.hold(share="batch", steps=5)
    jobs = [bench.submit(request(request_id=f"batch-{seed}", seed=seed, steps=5, share="batch")) for seed in range(6)]
    jobs.append(bench.submit(request(request_id="other", steps=6, share="other")))
    for job in (held, *jobs):
        job.future.add_done_callback(lambda _, name=job.request.request_id: ended.append(name))
    opened.set()
    for job in (held, *jobs):
        job.future.result(WAIT_S)
    # Without shares the longest goes last; with them it has every other step.
    assert ended.index("other") <= 2
    worker.close()


def test_a_pass_that_callers_share_is_charged_by_images() -> None:
    bench = Bench(max_batch_images=3)
    books = bench.worker._queue.device_books
    charged, worked = defaultdict[str, float](float), books.worked

    def charge(parts: Mapping[str, float], seconds: float, now_s: float) -> None:
        # What the books say is forgotten by and by, the sooner the busier the machine.
        for share, part in parts.items():
            charged[share] += part * seconds
        worked(parts, seconds, now_s)

    books.worked = charge
    held, opened = bench.hold()
    jobs = [bench.submit(request(share="one")), bench.submit(request(share="many", num_images=2, seed=5))]
    opened.set()
    assert {job.future.result(WAIT_S).batch_size for job in (*jobs, held)} == {3, 1}
    bench.worker.close()
    assert charged["one"] > 0
    assert charged["many"] == pytest.approx(2 * charged["one"])


def suspended(bench: Bench, **changes: Any) -> tuple[Job, threading.Event]:
    """Have a long request set aside for a short one that is held; return the long one's job and what lets go."""
    held, opened = bench.hold(**changes)
    reached, go_on = threading.Event(), threading.Event()

    def stop(*_: int) -> None:
        reached.set()
        assert go_on.wait(WAIT_S)

    bench.submit(request(steps=2, adapters=(use_of("me/1"),)), on_steps(stop))
    opened.set()
    assert reached.wait(WAIT_S)
    assert not held.future.done()
    return held, go_on


def test_a_run_whose_caller_left_while_it_was_set_aside_draws_no_further_step() -> None:
    bench = Bench()
    held, go_on = suspended(bench)
    assert held.cancel()
    go_on.set()
    bench.alone(request(steps=1))
    assert bench.worker.snapshot().steps == 1 + 2 + 1
    bench.worker.close()


def test_a_run_whose_deadline_passes_while_it_is_set_aside_is_ended() -> None:
    bench = Bench()
    held, go_on = suspended(bench, due=WallClockDeadline(YEAR_2030 + 50.0, 50.0))
    bench.later_s = 51.0
    go_on.set()
    with pytest.raises(DeadlineExceeded):
        held.future.result(WAIT_S)
    bench.alone(request(steps=1))
    assert bench.worker.snapshot().steps == 1 + 2 + 1
    bench.worker.close()


def test_closing_ends_what_is_set_aside_too() -> None:
    bench = Bench()
    held, go_on = suspended(bench)
    closing = threading.Thread(target=bench.worker.close)
    closing.start()
    while bench.worker.snapshot().is_alive:
        pass
    go_on.set()
    closing.join(WAIT_S)
    with pytest.raises(ReplicaLost):
        held.future.result(0)


def test_closing_with_draining_finishes_what_is_set_aside() -> None:
    bench = Bench()
    held, go_on = suspended(bench)
    go_on.set()
    bench.worker.close(is_draining=True)
    assert held.future.result(0).images


def test_requests_that_are_alike_and_wait_together_share_a_pass() -> None:
    bench = Bench()
    held, opened = bench.hold()
    jobs = [bench.submit(request(seed=seed, steps=2)) for seed in range(2)]
    opened.set()
    assert [job.future.result(WAIT_S).batch_size for job in jobs] == [2, 2]
    held.future.result(WAIT_S)
    bench.worker.close()


def test_what_has_not_begun_is_given_back_the_last_first_and_keeps_its_age_elsewhere() -> None:
    bench = Bench(sharing=SharingPolicy(max_slowdown=1e6))
    held, opened = bench.hold()
    jobs = [bench.submit(request(request_id=f"{steps}", steps=steps, num_images=2)) for steps in (4, 1, 40)]
    bench.later_s = 7.0
    each_s = [bench.worker.snapshot().pace.seconds(job.waiting.units) for job in jobs]
    keep_s = bench.worker.snapshot().backlog_s - each_s[2] - each_s[0] / 2
    assert bench.worker.give_back(keep_s) == 2
    for job in (jobs[2], jobs[0]):
        with pytest.raises(GivenBack) as given:
            job.future.result(0)
        assert given.value.waited_s >= 7.0
    again = bench.submit(replace(jobs[0].request, waited_s=7.0))
    assert bench.worker.give_back(0.0) == 2
    with pytest.raises(GivenBack) as given:
        again.future.result(0)
    assert given.value.waited_s >= 7.0
    opened.set()
    assert held.future.result(WAIT_S).images
    bench.worker.close()


def test_a_part_of_a_large_request_overtakes_nobody_for_being_small() -> None:
    bench = Bench()
    held, opened = bench.hold(steps=1)
    ended: list[str] = []
    whole = request(request_id="eight", steps=3, num_images=8)
    for one in (whole.part(0, 1), request(request_id="two", steps=3, num_images=2, adapters=(use_of("me/0"),))):
        job = bench.submit(one)
        job.future.add_done_callback(lambda _, name=one.request_id: ended.append(name))
    opened.set()
    held.future.result(WAIT_S)
    bench.worker.close(is_draining=True)
    assert ended == ["two", "eight"]
