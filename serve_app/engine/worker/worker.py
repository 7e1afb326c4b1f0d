"""The device thread: the one thread in which queue, weights and pipeline meet.

Owns the thread, the queue's contents and the life of jobs. Must not know HTTP, Ray or where adapters come
from.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from serve_app.core import GenerationRequest, GenerationResult, Scale
from serve_app.engine.adapters.deltas import ParsedAdapter
from serve_app.engine.adapters.inversion import words_of
from serve_app.engine.drawing.pipeline import BasePipeline
from serve_app.engine.drawing.steps import GenerationCancelled
from serve_app.engine.weights.fused import FusedWeights, adapter_set_key
from serve_app.engine.weights.integrity import ThrottledChecker
from serve_app.engine.weights.prefetch import SwapPrefetcher
from serve_app.engine.weights.shortage import is_out_of_memory
from serve_app.engine.worker.device_health import DeviceHealth
from serve_app.engine.worker.jobs import Job, JobQueue, OnEvent
from serve_app.engine.worker.memory import OomCounts, OomRecovery
from serve_app.engine.worker.pace import LoadStats, LoadTracker, guess_of
from serve_app.engine.worker.passes import BatchRunner, no_room_for_adapters, results_of
from serve_app.engine.worker.scheduling import AdapterSetKey, QueuePolicy, batch_key
from serve_app.engine.worker.traces import log_start, trace_dropped, trace_pass
from serve_app.errors import InternalError, LoraplexError, OutOfMemory, ReplicaLost, strip_traceback
from serve_app.work import LatencyModel, work_units

log = logging.getLogger(__name__)

NO_WORK = LoadStats(0.0, guess_of("cpu"), 0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class WorkerState:
    """What a worker is doing: requests waiting and running, the adapters in the weights, and whether it can go on.

    `steps` counts the denoising steps run since the start, whoever they were for.

    `failed_batches` counts the batches since the last good one that failed for reasons of ours: a device that
    is broken for good shows as a number that grows. `is_corrupt` says that the loaded weights have changed, after
    which the worker takes nothing more; `self_checks` counts the times that all of them were found sound. `is_lost`
    says the same of the device itself, and `stalled_s` for how long it has made no headway though there is work.
    `prepared` counts the swaps that had been prepared while the batch before them ran. `work` is the same in seconds.
    """

    waiting: int
    running: int
    applied: AdapterSetKey
    is_alive: bool
    failed_batches: int
    steps: int = 0
    is_corrupt: bool = False
    self_checks: int = 0
    prepared: int = 0
    work: LoadStats = NO_WORK
    is_lost: bool = False
    stalled_s: float = 0.0
    shortages: OomCounts = OomCounts()

    @property
    def backlog_s(self) -> float:
        """Seconds of work that run, wait or are on their way here."""
        return self.work.backlog_s

    @property
    def pace(self) -> LatencyModel:
        """The pace measured of late."""
        return self.work.pace


class EngineWorker:
    """Runs requests on one base, batch after batch, in a thread of its own.

    Nothing but that thread touches the pipeline and the weights, except that a helper may prepare the next swap.
    Every job that was accepted ends: in its result, an error or its cancellation. What goes wrong in a batch reaches
    the jobs of that batch alone; where memory runs out, its images are tried once more one by one. Once the loaded
    weights are found damaged, or the device beyond repair, no image comes from them any more.
    """

    def __init__(
        self,
        pipeline: BasePipeline,
        weights: FusedWeights,
        *,
        max_batch_images: int,
        torch_threads: int | None = None,
        prepares_ahead: bool = False,
        self_check: ThrottledChecker | None = None,
        policy: QueuePolicy | None = None,
        max_backlog_s: float | None = None,
        typical_units: float = 1.0,
        clock: Callable[[], float] = time.perf_counter,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """Start the thread.

        Args:
            pipeline: What makes the images.
            weights: The weights of the pipeline's components.
            max_batch_images: What a batch of several requests may hold.
            torch_threads: How many threads it computes with; None leaves torch's own choice.
            prepares_ahead: Fuse the next batch's adapters while a batch runs; on a CPU the batch pays for it.
            self_check: Checks the loaded weights between batches and while nothing waits.
            policy: How far the order of arrival may be broken.
            max_backlog_s: Beyond how much work nothing more is accepted; None for no such limit.
            typical_units: The work of a request, until there have been some.
            clock: Seconds that only grow.
            wall_clock: Seconds since 1970, in which deadlines come.
        """
        self._pipeline = pipeline
        self._weights = weights
        self._torch_threads = torch_threads
        self._clock = clock
        self._books = LoadTracker(guess_of(pipeline.device.type), typical_units=typical_units)
        self._queue = JobQueue(
            self._books,
            policy or QueuePolicy(),
            max_images=max_batch_images,
            max_backlog_s=max_backlog_s,
            clock=clock,
            wall_clock=wall_clock,
        )
        self._changed = threading.Condition()
        self._is_closing = False
        self._is_aborting = False
        self._failed_batches = 0
        self._steps = 0
        self._applied: AdapterSetKey = weights.applied
        self._prefetcher = SwapPrefetcher(weights, torch_threads=torch_threads, clock=clock) if prepares_ahead else None
        self._soundness = DeviceHealth(pipeline.base_id, pipeline.device, self_check)
        self._memory = OomRecovery(pipeline, weights, self._prefetcher, verify=self._soundness.check_all, clock=clock)
        self._is_abandoned = False
        self._last_progress_s = clock()
        self._thread = threading.Thread(target=self._work, name=f"device-{pipeline.base_id}", daemon=True)
        self._thread.start()

    def submit(
        self,
        request: GenerationRequest,
        adapters: Sequence[tuple[ParsedAdapter, Scale]],
        *,
        on_event: OnEvent | None = None,
    ) -> Job:
        """Queue a request and return at once; `adapters` are those of the request, parsed, in its order.

        Raises:
            BadRequest: the base cannot do what is asked.
            DeadlineExceeded: its deadline has passed, or cannot be met with what waits before it.
            ReplicaLost: the worker is closing.
        """
        assert len(adapters) == len(request.adapters)
        self._pipeline.check(request)
        words_of(adapter for adapter, _ in adapters)
        key = batch_key(request, adapter_set_key(adapters))
        with self._changed:
            if self._is_closing:
                raise ReplicaLost(self._pipeline.base_id, attempts=1)
            if not self._has_work:
                self._last_progress_s = self._clock()
            job = self._queue.add(request, adapters, key, on_event)
            self._changed.notify()
        return job

    @contextmanager
    def expecting(self, request: GenerationRequest) -> Iterator[None]:
        """Count a request as work ahead while it is on its way here: while its adapters are fetched.

        Raises:
            QueueFull: there is more work ahead than is accepted.
        """
        units = work_units(request)
        with self._changed:
            self._queue.check_room(request)
            self._books.add_pending(units)
        try:
            yield
        finally:
            with self._changed:
                self._books.remove_pending(units)

    def snapshot(self) -> WorkerState:
        """Return what the worker is doing right now."""
        with self._changed:
            return WorkerState(
                waiting=len(self._queue.waiting()),
                running=len(self._queue.running),
                applied=self._applied,
                is_alive=self._thread.is_alive() and not self._is_closing,
                failed_batches=self._failed_batches,
                steps=self._steps,
                is_corrupt=self._soundness.is_corrupt,
                self_checks=self._soundness.completed_rounds,
                prepared=0 if self._prefetcher is None else self._prefetcher.bound,
                work=self._queue.work(),
                is_lost=self._soundness.is_lost,
                stalled_s=self._clock() - self._last_progress_s if self._has_work else 0.0,
                shortages=self._memory.shortages,
            )

    def close(self, *, is_draining: bool = False) -> None:
        """Take nothing more, end every job and the thread, and wait for it; for any thread but the device's.

        With `is_draining`, what waits still gets its images; otherwise it fails with `ReplicaLost`, and what
        runs stops at its next step. A device thread that was abandoned is not waited for.
        """
        with self._changed:
            self._is_closing = True
            self._is_aborting = self._is_aborting or not is_draining
            self._changed.notify()
        if not self._is_abandoned:
            self._thread.join()

    def fail_all(self, why: str) -> None:
        """End every job with `ReplicaLost` at once, also those of a device thread that hangs; from any thread."""
        with self._changed:
            self._is_aborting = self._is_abandoned = True
            self._changed.notify()
        self._abandon(why)

    def _work(self) -> None:
        if self._torch_threads is not None:
            torch.set_num_threads(self._torch_threads)  # counts for the thread that says it
        try:
            while self._turn():
                pass
        finally:
            self._abandon()
            if self._prefetcher is not None:
                self._prefetcher.close()

    def _turn(self) -> bool:
        """Run the next batch; False when there will be no more. Its jobs and tensors are let go on return."""
        jobs = self._take()
        if not jobs:
            return False
        self._report_positions(jobs)
        log_start(jobs)
        began_s = self._clock()
        endings = self._run(jobs)
        trace_pass(jobs, endings, began_s=began_s, ended_s=self._clock())
        with self._changed:
            self._queue.ended(denoise_s=_denoise_s(endings))
        for job, ending in zip(jobs, endings, strict=True):
            job.end(ending)
        self._soundness.check_slice()
        return True

    def _take(self) -> tuple[Job, ...]:
        """Wait for the next batch and return its jobs; none when there will be no more."""
        while self._soundness.is_healthy:
            with self._changed:
                if self._is_aborting:
                    break
                self._last_progress_s = self._clock()
                late = self._queue.drop_expired()
                if jobs := self._queue.next(self._applied):
                    self._queue.begin(jobs)
                is_over = self._is_closing and not jobs
                is_idle = not (jobs or late or is_over) and not self._changed.wait(self._soundness.pause_s)
            for job, error in late:
                trace_dropped(job, error, now_s=self._clock())
                job.end(error)
            if jobs or is_over:
                return jobs
            if is_idle:
                self._soundness.check_slice()
        return ()

    def _prefetch_next(self) -> None:
        """Have the adapters of the next batch fused, as far as one can know which that will be."""
        if self._prefetcher is None:
            return
        with self._changed:
            jobs = self._queue.next(self._applied)
        if jobs:
            self._prefetcher.prepare(jobs[0].adapters)

    @property
    def _has_work(self) -> bool:
        return bool(self._queue.running or self._queue.waiting())

    def _report_positions(self, running: Sequence[Job]) -> None:
        with self._changed:
            waiting = self._queue.waiting()
        for job in running:
            job.start()
        for index, job in enumerate(waiting):
            job.place(len(running) + index)

    def _run(self, jobs: Sequence[Job]) -> Sequence[GenerationResult | Exception]:
        """Run one batch and return how it ended for each of its jobs."""
        try:
            endings = self._draw(jobs)
        except GenerationCancelled:
            return self._lost(jobs)
        except LoraplexError as error:
            log.warning("a batch was refused on the device: %s: %s", _ids(jobs), error)
            return [strip_traceback(error) for _ in jobs]
        except Exception as error:
            self._failed_batches += 1
            log.exception("a batch failed: %s", _ids(jobs))
            self._soundness.record_device_error(error)
            return (
                [InternalError(job.request.request_id) for job in jobs]
                if self._soundness.is_healthy
                else self._lost(jobs)
            )
        return endings if self._soundness.is_healthy else self._lost(jobs)

    def _draw(self, jobs: Sequence[Job]) -> Sequence[GenerationResult | Exception]:
        """Apply the adapters of a batch and draw it, each tried once more with memory freed where that runs out."""
        started_s = self._clock()
        if not self._memory.run_with_oom_retry(lambda: self._apply(jobs[0].adapters)):
            return [no_room_for_adapters(job) for job in jobs]
        applied_s = self._clock()
        self._prefetch_next()
        passes = BatchRunner(self._pipeline, self._memory, on_step=self._report, is_aborting=lambda: self._is_aborting)
        drawn = passes.draw(jobs, words_of(adapter for adapter, _ in jobs[0].adapters))
        endings = results_of(drawn, device=self._pipeline.device_name, started_s=started_s, applied_s=applied_s)
        self._failed_batches = self._failed_batches + 1 if self._is_starved(jobs, endings) else 0
        return endings

    def _is_starved(self, jobs: Sequence[Job], endings: Sequence[object]) -> bool:
        """Whether not even images of the base's own size found room: then something else fills the device."""
        pixels = jobs[0].request.width * jobs[0].request.height
        return pixels <= self._pipeline.default_pixels and all(isinstance(one, OutOfMemory) for one in endings)

    def _lost(self, jobs: Sequence[Job]) -> list[GenerationResult | Exception]:
        return [ReplicaLost(self._pipeline.base_id, attempts=1, reason=self._soundness.failure_reason) for _ in jobs]

    def _apply(self, adapters: Sequence[tuple[ParsedAdapter, Scale]]) -> None:
        applier = self._weights if self._prefetcher is None else self._prefetcher
        try:
            applier.apply(adapters)
        except Exception as error:
            if not is_out_of_memory(error):  # else once there is room for the check
                self._soundness.check_all()
            raise
        finally:
            self._applied = self._weights.applied
            self._last_progress_s = self._clock()

    def _report(self, jobs: Sequence[Job], step: int, steps: int) -> None:
        self._steps += 1
        self._last_progress_s = self._clock()
        self._prefetch_next()
        for job in jobs:
            job.report(step, steps)

    def _abandon(self, why: str | None = None) -> None:
        """Fail all remaining jobs when the thread ends, for whatever reason."""
        with self._changed:
            self._is_closing = True
            left = self._queue.clear()
        for job in left:
            job.end(ReplicaLost(self._pipeline.base_id, attempts=1, reason=why or self._soundness.failure_reason))


def _denoise_s(endings: Sequence[GenerationResult | Exception]) -> float | None:
    """Return how long a pass denoised, or None where it made nothing."""
    return next((ending.timings.denoise_ms / 1e3 for ending in endings if isinstance(ending, GenerationResult)), None)


def _ids(jobs: Sequence[Job]) -> str:
    return ", ".join(job.request.request_id for job in jobs)
