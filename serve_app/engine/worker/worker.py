"""The device thread: the one thread in which queue, weights and pipeline meet.

Owns the thread, the queue's contents and the life of jobs. Must not know HTTP, Ray or where adapters come from.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager

import torch

from serve_app.core import GenerationRequest, GenerationResult, GivenBack, Scale
from serve_app.engine.adapters.deltas import ParsedAdapter
from serve_app.engine.adapters.inversion import ti_tokens_of
from serve_app.engine.drawing.pipeline import BasePipeline
from serve_app.engine.drawing.steps import GenerationCancelled
from serve_app.engine.weights.fused import FusedWeights, adapter_set_key
from serve_app.engine.weights.integrity import ThrottledChecker
from serve_app.engine.weights.prefetch import SwapPrefetcher
from serve_app.engine.weights.shortage import is_out_of_memory
from serve_app.engine.worker.device_health import DeviceHealth
from serve_app.engine.worker.greenlets import RunGreenlets
from serve_app.engine.worker.job import Job, OnEvent, ids_of
from serve_app.engine.worker.jobs import JobQueue, Run
from serve_app.engine.worker.memory import OomRecovery
from serve_app.engine.worker.pace import LoadTracker, guess_of
from serve_app.engine.worker.passes import BatchRunner, denoise_s, out_of_memory_for_adapters, results_of
from serve_app.engine.worker.scheduling import AdapterSetKey, QueuePolicy, batch_key
from serve_app.engine.worker.state import WorkerState
from serve_app.engine.worker.swap_timer import recorder_of
from serve_app.engine.worker.traces import log_start, trace_dropped, trace_pass
from serve_app.engine.worker.turns import ChooseTurn, SharingPolicy, next_claim
from serve_app.errors import InternalError, LoraplexError, OutOfMemory, ReplicaLost, strip_traceback
from serve_app.work import work_units

log = logging.getLogger(__name__)


class EngineWorker:
    """Runs requests on one base in a thread of its own, batch after batch or taking turns between their steps.

    Nothing but that thread touches the pipeline and the weights, except that a helper may prepare the next swap.
    Every job that was accepted ends: in its result, an error or its cancellation. A failure in a batch reaches the
    jobs of that batch alone; where memory runs out, its images are tried once more one by one. Once the loaded
    weights are found damaged, or the device beyond repair, no image comes from them any more.
    """

    def __init__(
        self,
        pipeline: BasePipeline,
        weights: FusedWeights,
        *,
        max_batch_images: int,
        torch_threads: int | None = None,
        prefetches_swap: bool = False,
        self_check: ThrottledChecker | None = None,
        policy: QueuePolicy | None = None,
        sharing: SharingPolicy | None = None,
        choose: ChooseTurn = next_claim,
        max_backlog_s: float | None = None,
        typical_units: float = 1.0,
        clock: Callable[[], float] = time.perf_counter,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """Start the thread.

        Args:
            pipeline: Draws the images.
            weights: The weights of the pipeline's components.
            max_batch_images: The most images in a batch of several requests.
            torch_threads: How many threads it computes with; None leaves torch's own choice.
            prefetches_swap: Fuse the next batch's adapters while a batch runs; on a CPU the batch pays for it.
            self_check: Checks the loaded weights between batches and while nothing waits.
            policy: How far the order of arrival may be broken where runs do not take turns.
            sharing: How runs take turns between two steps; None where each has the device to its end.
            choose: Decides whose turn it is.
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
            sharing=sharing,
            choose=choose,
            record_event=recorder_of(pipeline.device),
        )
        self._greenlets = RunGreenlets(self._run)
        self._changed = threading.Condition()
        self._is_closing = False
        self._is_aborting = False
        self._failed_batches = 0
        self._steps = 0
        self._applied: AdapterSetKey = weights.applied
        self._prefetcher = (
            SwapPrefetcher(weights, torch_threads=torch_threads, clock=clock) if prefetches_swap else None
        )
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
        ti_tokens_of(adapter for adapter, _ in adapters)
        key = batch_key(request, adapter_set_key(adapters), self._pipeline.count_chunks(request))
        with self._changed:
            if self._is_closing:
                raise ReplicaLost(self._pipeline.base_id, attempts=1)
            if not self._has_work:
                self._last_progress_s = self._clock()
            job = self._queue.add(request, adapters, key, on_event)
            self._changed.notify()
        job.future.add_done_callback(self._drop_cancelled)
        return job

    def _drop_cancelled(self, future: Future[GenerationResult]) -> None:
        """Let go of a job that was given up while it waits: its adapters are in no budget any more."""
        if future.cancelled():
            with self._changed:
                self._queue.drop_cancelled()

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

    def give_back(self, keep_s: float) -> int:
        """End what has not begun with `GivenBack`, the last first, until `keep_s` of work are left; return how many."""
        with self._changed:
            given = self._queue.give_back(keep_s)
        for job in given:
            job.end(GivenBack(self._clock() - job.submitted_at))
        return len(given)

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
                suspended=self._queue.num_suspended,
                changes=self._queue.device_books.changes,
                changing_s=self._queue.device_books.changing_s,
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

    def fail_all(self, reason: str) -> None:
        """End every job with `ReplicaLost` at once, also those of a device thread that hangs; from any thread."""
        with self._changed:
            self._is_aborting = self._is_abandoned = True
            self._changed.notify()
        self._abandon(reason)

    def _work(self) -> None:
        if self._torch_threads is not None:
            torch.set_num_threads(self._torch_threads)  # counts for the thread that says it
        # So does this: a pass that is suspended inside `no_grad` would hand its state to the next, and take its own.
        torch.set_grad_enabled(False)
        try:
            while self._run_next():
                pass
        finally:
            self._abandon()
            if self._prefetcher is not None:
                self._prefetcher.close()

    def _run_next(self) -> bool:
        """Have one run go on until it ends or is set aside; False when there will be no more."""
        run = self._take()
        if run is None:
            for left in self._greenlets.suspended:
                self._go_on(left)  # which ends it, as the worker is stopping
            return False
        self._go_on(run)
        return True

    def _go_on(self, run: Run) -> None:
        endings = self._greenlets.go_on(run)
        if endings is None:
            return
        trace_pass(run.jobs, endings, began_s=run.began_s, ended_s=self._clock())
        with self._changed:
            self._queue.ended(run, denoise_s=denoise_s(endings))
        for job, ending in zip(run.jobs, endings, strict=True):
            job.end(ending)
        self._soundness.check_slice()

    def _take(self) -> Run | None:
        """Wait for a run that is to have the device, and return it; None when there will be no more."""
        while self._soundness.is_healthy:
            with self._changed:
                if self._is_aborting:
                    break
                self._last_progress_s = self._clock()
                late = self._queue.drop_expired()
                run = self._queue.take_turn(self._applied)
                is_over = self._is_closing and run is None
                is_idle = not (run or late or is_over) and not self._changed.wait(self._soundness.pause_s)
            for job, error in late:
                trace_dropped(job, error, now_s=self._clock())
                job.end(error)
            if run is not None or is_over:
                return run
            if is_idle:
                self._soundness.check_slice()
        return None

    def _prefetch_next(self) -> None:
        """Have the adapters of the next run fused, as far as one can know which that will be."""
        if self._prefetcher is None:
            return
        with self._changed:
            adapters = self._queue.upcoming(self._applied)
        self._prefetcher.prepare(adapters)

    @property
    def _has_work(self) -> bool:
        return bool(self._queue.running or self._queue.waiting())

    @property
    def _is_stopping(self) -> bool:
        """Whether no run is to go on."""
        return self._is_aborting or not self._soundness.is_healthy

    def _report_positions(self, run: Run) -> None:
        with self._changed:
            waiting, begun = self._queue.waiting(), len(self._queue.running)
        for job in run.jobs:
            job.start()
        for index, job in enumerate(waiting):
            job.report_position(begun + index)

    def _run(self, run: Run) -> Sequence[GenerationResult | Exception]:
        """Draw one run and return how it ended for each of its jobs; in its greenlet."""
        jobs = run.jobs
        self._report_positions(run)
        log_start(jobs)
        try:
            endings = self._draw(run)
        except GenerationCancelled:
            return self._lost(jobs)
        except LoraplexError as error:
            log.warning("a batch was refused on the device: %s: %s", ids_of(jobs), error)
            return [strip_traceback(error) for _ in jobs]
        except Exception as error:
            self._failed_batches += 1
            log.exception("a batch failed: %s", ids_of(jobs))
            self._soundness.record_device_error(error)
            failed = [InternalError(job.request.request_id) for job in jobs]
            return failed if self._soundness.is_healthy else self._lost(jobs)
        return endings if self._soundness.is_healthy else self._lost(jobs)

    def _draw(self, run: Run) -> Sequence[GenerationResult | Exception]:
        """Apply the adapters of a run and draw it, each tried once more with memory freed where that runs out."""
        if not self._memory.run_with_oom_retry(lambda: self._bind(run)):
            return [out_of_memory_for_adapters(job) for job in run.jobs]
        self._prefetch_next()
        passes = BatchRunner(
            self._pipeline,
            self._memory,
            bind=lambda: self._bind(run),
            on_step=lambda jobs, step, steps: self._report(run, jobs, step, steps),
            between_steps=lambda: self._yield_device(run),
            is_aborting=lambda: self._is_stopping,
        )
        drawn = passes.draw(run.jobs, ti_tokens_of(adapter for adapter, _ in run.adapters))
        endings = results_of(drawn, run, device=self._pipeline.device_name)
        self._failed_batches = self._failed_batches + 1 if self._is_starved(run.jobs, endings) else 0
        return endings

    def _is_starved(self, jobs: Sequence[Job], endings: Sequence[object]) -> bool:
        """Whether not even images of the base's own size found room: then something else fills the device."""
        pixels = jobs[0].request.width * jobs[0].request.height
        return pixels <= self._pipeline.default_pixels and all(isinstance(one, OutOfMemory) for one in endings)

    def _lost(self, jobs: Sequence[Job]) -> list[GenerationResult | Exception]:
        return [ReplicaLost(self._pipeline.base_id, attempts=1, reason=self._soundness.failure_reason) for _ in jobs]

    def _bind(self, run: Run) -> None:
        """Have the run's adapters in the weights, and only those."""
        if self._applied == run.composition:
            return
        self._queue.changing()
        applier = self._weights if self._prefetcher is None else self._prefetcher
        try:
            applier.apply(run.adapters)
        except Exception as error:
            if not is_out_of_memory(error):  # else once there is room for the check
                self._soundness.check_all()
            raise
        finally:
            self._applied = self._weights.applied
            self._last_progress_s = self._clock()
            with self._changed:
                self._queue.changed(run, kept=self._weights.kept)

    def _report(self, run: Run, jobs: Sequence[Job], step: int, steps: int) -> None:
        self._steps += 1
        self._last_progress_s = self._clock()
        with self._changed:
            self._queue.advanced(run, left=1 - step / steps)
        self._prefetch_next()
        for job in jobs:
            job.report(step, steps)

    def _yield_device(self, run: Run) -> None:
        """Set a run aside where another's turn has come, until its own comes again.

        Raises:
            GenerationCancelled: no caller waits for it any more.
        """
        with self._changed:
            if not self._queue.is_to_suspend(run, self._applied):
                return
            self._queue.suspended(run)
        for job in run.jobs:
            job.set_aside()
        since_s = self._clock()
        self._greenlets.suspend()
        run.suspended_s += self._clock() - since_s
        if self._is_stopping or not run.is_wanted:
            raise GenerationCancelled
        self._bind(run)

    def _abandon(self, reason: str | None = None) -> None:
        """Fail all remaining jobs when the thread ends, for any reason."""
        with self._changed:
            self._is_closing = True
            left = self._queue.clear()
        for job in left:
            job.end(ReplicaLost(self._pipeline.base_id, attempts=1, reason=reason or self._soundness.failure_reason))
