"""The queue as the device thread runs it: deadlines, room, order, and the books of its work."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from serve_app.core import GenerationRequest, WallClockDeadline
from serve_app.engine.weights.fused import FusedWeights
from serve_app.engine.worker.job import Job
from serve_app.engine.worker.scheduling import QueuePolicy
from serve_app.engine.worker.worker import EngineWorker
from serve_app.errors import DeadlineExceeded, DeadlineOutOfReach, QueueFull
from tests.clock import Clock
from tests.engine_cases import on_steps, parsed_adapter, request, use_of, wrap
from tests.tiny import tiny_pipeline

WAIT_S = 60.0
YEAR_2030 = 1_900_000_000.0


class Bench:
    """A worker on a tiny base, one image at a time, in a time of its own."""

    def __init__(self, **settings: Any) -> None:
        self.clock, self.wall_clock = Clock(), Clock(YEAR_2030)
        pipeline = wrap(tiny_pipeline("sd15"), schedulers=("DDIMScheduler",))
        self.weights = FusedWeights(pipeline.components)
        self.adapters = [parsed_adapter(pipeline.manifest, seed=seed) for seed in range(2)]
        self.worker = EngineWorker(
            pipeline,
            self.weights,
            max_batch_images=1,
            torch_threads=1,
            clock=self.clock,
            wall_clock=self.wall_clock,
            **settings,
        )

    def submit(self, adapter: int | None = None, **changes: Any) -> Job:
        if adapter is None:
            return self.worker.submit(request(**changes), ())
        wanted = request(adapters=(use_of(f"me/{adapter}"),), **changes)
        return self.worker.submit(wanted, [(self.adapters[adapter], 1.0)])

    def hold(self, adapter: int | None = None) -> tuple[Job, threading.Event]:
        """Hold the device thread in a pass; return its job and what lets it go on."""
        reached, opened = threading.Event(), threading.Event()

        def stop(*_: int) -> None:
            reached.set()
            assert opened.wait(WAIT_S)

        adapters = [] if adapter is None else [(self.adapters[adapter], 1.0)]
        wanted = request(steps=1, adapters=() if adapter is None else (use_of(f"me/{adapter}"),))
        job = self.worker.submit(wanted, adapters, on_event=on_steps(stop))
        assert reached.wait(WAIT_S)
        return job, opened

    def due_in(self, seconds: float) -> WallClockDeadline:
        return WallClockDeadline(self.wall_clock() + seconds, limit_s=seconds)

    def pass_time(self, seconds: float) -> None:
        self.clock.now += seconds
        self.wall_clock.now += seconds


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.worker.close()


def run(bench: Bench, **changes: Any) -> None:
    bench.submit(**changes).future.result(WAIT_S)


def test_a_request_whose_deadline_passes_in_the_queue_is_ended_and_not_run(bench: Bench) -> None:
    held, opened = bench.hold()
    late = bench.submit(due=bench.due_in(10.0))
    in_time = bench.submit(due=bench.due_in(1000.0))
    steps = bench.worker.snapshot().steps
    bench.pass_time(11.0)
    opened.set()
    with pytest.raises(DeadlineExceeded, match="longer than 10 s"):
        late.future.result(WAIT_S)
    in_time.future.result(WAIT_S)
    held.future.result(WAIT_S)
    assert bench.worker.snapshot().steps == steps + request().steps


def test_a_request_whose_deadline_has_passed_is_refused_before_the_queue(bench: Bench) -> None:
    with pytest.raises(DeadlineExceeded):
        bench.submit(due=bench.due_in(0.0))
    assert bench.worker.snapshot().waiting == 0


def test_a_deadline_that_what_waits_puts_out_of_reach_is_refused_at_once(bench: Bench) -> None:
    run(bench)
    held, opened = bench.hold()
    prefetcher = bench.submit(num_images=6)
    try:
        with pytest.raises(DeadlineOutOfReach, match="within 0.001 s"):
            bench.submit(due=bench.due_in(0.001))
    finally:
        opened.set()
        held.future.result(WAIT_S)
        prefetcher.future.result(WAIT_S)


def test_a_request_without_a_deadline_waits_for_as_long_as_it_takes(bench: Bench) -> None:
    _, opened = bench.hold()
    patient = bench.submit()
    bench.pass_time(1e6)
    opened.set()
    assert patient.future.result(WAIT_S).images


def test_the_books_count_what_runs_waits_and_is_on_its_way(bench: Bench) -> None:
    run(bench)
    assert bench.worker.snapshot().backlog_s == 0
    _, opened = bench.hold()
    seen = [bench.worker.snapshot().backlog_s]
    waiting = bench.submit()
    seen.append(bench.worker.snapshot().backlog_s)
    with bench.worker.expecting(request()):
        state = bench.worker.snapshot()
        assert state.work.pending_fetches == 1
        seen.append(state.backlog_s)
    assert bench.worker.snapshot().backlog_s == pytest.approx(seen[1])
    opened.set()
    waiting.future.result(WAIT_S)
    assert 0 < seen[0] < seen[1] < seen[2]
    assert bench.worker.snapshot().backlog_s == 0


def test_a_cancelled_request_is_no_work(bench: Bench) -> None:
    _, opened = bench.hold()
    before = bench.worker.snapshot().backlog_s
    gone = bench.submit()
    gone.cancel()
    assert bench.worker.snapshot().backlog_s == pytest.approx(before)
    opened.set()


def test_with_too_much_work_ahead_a_request_is_refused_with_the_time_after_which_to_ask_again() -> None:
    bench = Bench(max_backlog_s=1.0)
    held, opened = bench.hold()  # of an unknown base on a CPU, which is taken to be slow
    waiting = [bench.submit(width=256, height=256, steps=40) for _ in range(3)]
    excess_s = bench.worker.snapshot().backlog_s - 1.0
    with pytest.raises(QueueFull) as refused, bench.worker.expecting(request()):
        pass
    for job in waiting:
        job.cancel()
    opened.set()
    held.future.result(WAIT_S)
    bench.worker.close()
    assert refused.value.retry_after_s == round(excess_s) > 1
    assert refused.value.limit == 4
    assert bench.worker.snapshot().work.pending_fetches == 0


def test_a_stream_for_the_applied_adapter_overtakes_another_request_only_as_often_as_allowed() -> None:
    bench = Bench(policy=QueuePolicy(max_overtakes=3, max_overtaken_s=1e9))
    order: list[str] = []
    _, opened = bench.hold(adapter=0)
    jobs: list[Job] = []
    for index in range(20):
        adapter = 1 if index in (0, 10) else 0
        job = bench.submit(adapter, steps=1, request_id=f"{'cold' if adapter else 'hot'}-{index}")
        job.future.add_done_callback(lambda _, name=job.request.request_id: order.append(name))
        jobs.append(job)
    opened.set()
    for job in jobs:
        job.future.result(WAIT_S)
    bench.worker.close()
    # Three of the hot ones go first; the other cold one then rides on the swap that the first one made.
    assert order[:5] == ["hot-1", "hot-2", "hot-3", "cold-0", "cold-10"]
    assert order[5:] == [f"hot-{index}" for index in range(4, 20) if index != 10]


def test_batch_requests_wait_for_interactive_ones() -> None:
    bench = Bench()
    order: list[str] = []
    _, opened = bench.hold()
    jobs: list[Job] = []
    wanted: tuple[GenerationRequest, ...] = (
        request(request_id="batch", steps=1, priority="batch"),
        request(request_id="first", steps=1),
        request(request_id="second", steps=1),
    )
    for each in wanted:
        job = bench.worker.submit(each, ())
        job.future.add_done_callback(lambda _, name=each.request_id: order.append(name))
        jobs.append(job)
    opened.set()
    for job in jobs:
        job.future.result(WAIT_S)
    bench.worker.close()
    assert order == ["first", "second", "batch"]
