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
from dataclasses import dataclass, replace

import torch

from serve_app.core import GenerationRequest, GenerationResult, PixelImage, Scale, Timings
from serve_app.engine.adapter import ParsedAdapter
from serve_app.engine.ahead import Ahead
from serve_app.engine.integrity import Damage, PacedCheck
from serve_app.engine.inversion import words_of
from serve_app.engine.job import Job, OnEvent
from serve_app.engine.jobs import JobQueue
from serve_app.engine.pace import WorkBooks, WorkState, guess_of
from serve_app.engine.pipeline import BasePipeline, PassOutcome, seeds_of
from serve_app.engine.queue import CompositionKey, QueuePolicy, batch_key
from serve_app.engine.steps import GenerationCancelled
from serve_app.engine.weights import AdapterWeights, composition_key
from serve_app.errors import InternalError, LoraplexError, ReplicaLost
from serve_app.work import Pace, work_units

log = logging.getLogger(__name__)

NO_WORK = WorkState(0.0, guess_of("cpu"), 0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class WorkerState:
    """What a worker is doing: requests waiting and running, the adapters in the weights, and whether it can go on.

    `steps` counts the denoising steps run since the start, whoever they were for.

    `failed_batches` counts the batches since the last good one that failed for reasons of ours: a device that
    is broken for good shows as a number that grows. `is_corrupt` says that the loaded weights have changed, after
    which the worker takes nothing more; `self_checks` counts the times that all of them were found sound.
    `prepared` counts the swaps that had been prepared while the batch before them ran. `work` is the same in seconds.
    """

    waiting: int
    running: int
    applied: CompositionKey
    is_alive: bool
    failed_batches: int
    steps: int = 0
    is_corrupt: bool = False
    self_checks: int = 0
    prepared: int = 0
    work: WorkState = NO_WORK

    @property
    def backlog_s(self) -> float:
        """Seconds of work that run, wait or are on their way here."""
        return self.work.backlog_s

    @property
    def pace(self) -> Pace:
        """The pace measured of late."""
        return self.work.pace


class EngineWorker:
    """Runs requests on one base, batch after batch, in a thread of its own.

    Nothing but that thread touches the pipeline and the weights, except that a helper may prepare the next swap.
    Every job that was accepted ends: in its result, an error or its cancellation. What goes wrong in a batch reaches
    the jobs of that batch alone. Once the loaded weights are found damaged, no image comes from them any more.
    """

    def __init__(
        self,
        pipeline: BasePipeline,
        weights: AdapterWeights,
        *,
        max_batch_images: int,
        torch_threads: int | None = None,
        prepares_ahead: bool = False,
        self_check: PacedCheck | None = None,
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
        self._books = WorkBooks(guess_of(pipeline.device.type), typical_units=typical_units)
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
        self._applied: CompositionKey = weights.applied
        self._ahead = Ahead(weights, torch_threads=torch_threads) if prepares_ahead else None
        self._self_check = self_check
        self._is_corrupt = False
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
        key = batch_key(request, composition_key(adapters))
        with self._changed:
            if self._is_closing:
                raise ReplicaLost(self._pipeline.base_id, attempts=1)
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
            self._books.expect(units)
        try:
            yield
        finally:
            with self._changed:
                self._books.stop_expecting(units)

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
                is_corrupt=self._is_corrupt,
                self_checks=0 if self._self_check is None else self._self_check.rounds,
                prepared=0 if self._ahead is None else self._ahead.bound,
                work=self._queue.work(),
            )

    def close(self, *, is_draining: bool = False) -> None:
        """Take nothing more, end every job and the thread, and wait for it; for any thread but the device's.

        With `is_draining`, what waits still gets its images; otherwise it fails with `ReplicaLost`, and what
        runs stops at its next step.
        """
        with self._changed:
            self._is_closing = True
            self._is_aborting = self._is_aborting or not is_draining
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        if self._torch_threads is not None:
            torch.set_num_threads(self._torch_threads)  # counts for the thread that says it
        try:
            while self._turn():
                pass
        finally:
            self._abandon()
            if self._ahead is not None:
                self._ahead.close()

    def _turn(self) -> bool:
        """Run the next batch; False when there will be no more. Its jobs and tensors are let go on return."""
        jobs = self._take()
        if not jobs:
            return False
        self._tell_places(jobs)
        endings = self._run(jobs)
        with self._changed:
            self._queue.ended(denoise_s=_denoise_s(endings))
        for job, ending in zip(jobs, endings, strict=True):
            job.end(ending)
        self._check_slice()
        return True

    def _take(self) -> tuple[Job, ...]:
        """Wait for the next batch and return its jobs; none when there will be no more."""
        while not self._is_corrupt:
            with self._changed:
                if self._is_aborting:
                    break
                late = self._queue.give_up_in_vain()
                if jobs := self._queue.next(self._applied):
                    self._queue.begin(jobs)
                is_over = self._is_closing and not jobs
                is_idle = not (jobs or late or is_over) and not self._changed.wait(self._pause_s)
            for job, error in late:
                job.end(error)
            if jobs or is_over:
                return jobs
            if is_idle:
                self._check_slice()
        return ()

    def _look_ahead(self) -> None:
        """Have the adapters of the next batch fused, as far as one can know which that will be."""
        if self._ahead is None:
            return
        with self._changed:
            jobs = self._queue.next(self._applied)
        if jobs:
            self._ahead.prepare(jobs[0].adapters)

    @property
    def _pause_s(self) -> float | None:
        return None if self._self_check is None else self._self_check.pause_s

    def _check_slice(self) -> None:
        if self._self_check is not None:
            self._note(self._self_check.check_next())

    def _note(self, damage: Damage | None) -> None:
        if damage is not None:
            log.critical("the loaded weights of %s have changed, in %s", self._pipeline.base_id, damage.tensor)
            self._is_corrupt = True

    def _tell_places(self, running: Sequence[Job]) -> None:
        with self._changed:
            waiting = self._queue.waiting()
        for job in running:
            job.start()
        for index, job in enumerate(waiting):
            job.place(len(running) + index)

    def _run(self, jobs: Sequence[Job]) -> Sequence[GenerationResult | Exception]:
        """Run one batch and return how it ended for each of its jobs."""
        try:
            started = self._clock()
            self._apply(jobs[0].adapters)
            applied = self._clock()
            self._look_ahead()
            with self._pipeline.knowing(words_of(adapter for adapter, _ in jobs[0].adapters)):
                outcome = self._pipeline.generate(
                    [job.request for job in jobs],
                    on_step=lambda step, steps: self._report(jobs, step, steps),
                    is_cancelled=lambda: self._is_aborting or all(job.is_cancelled for job in jobs),
                    on_preview=lambda shares: _show(jobs, shares),
                )
        except GenerationCancelled:
            return [ReplicaLost(self._pipeline.base_id, attempts=1) for _ in jobs]
        except LoraplexError as error:
            log.warning("a batch of %d was refused on the device: %s", len(jobs), error)
            return [_without_frames(error) for _ in jobs]
        except Exception:
            self._failed_batches += 1
            log.exception("a batch failed: %s", ", ".join(job.request.request_id for job in jobs))
            if self._is_corrupt:
                return [ReplicaLost(self._pipeline.base_id, attempts=1) for _ in jobs]
            return [InternalError(job.request.request_id) for job in jobs]
        self._failed_batches = 0
        return self._results(jobs, outcome, started, applied)

    def _apply(self, adapters: Sequence[tuple[ParsedAdapter, Scale]]) -> None:
        applier = self._weights if self._ahead is None else self._ahead
        try:
            applier.apply(adapters)
        except Exception:
            if self._self_check is not None:
                self._note(self._self_check.check_all())
            raise
        finally:
            self._applied = self._weights.applied

    def _report(self, jobs: Sequence[Job], step: int, steps: int) -> None:
        self._steps += 1
        self._look_ahead()
        for job in jobs:
            job.report(step, steps)

    def _results(
        self, jobs: Sequence[Job], outcome: PassOutcome, started: float, applied: float
    ) -> list[GenerationResult | Exception]:
        """Return each job's share of a pass; the times, queueing apart, are those of the whole batch."""
        swap_ms = (applied - started) * 1e3
        timings = Timings(swap_ms=swap_ms, denoise_ms=outcome.denoise_ms, decode_ms=outcome.decode_ms)
        batch_size = sum(job.request.num_images for job in jobs)
        results: list[GenerationResult | Exception] = []
        for job, images, warnings in zip(jobs, outcome.images, outcome.warnings, strict=True):
            if isinstance(images, LoraplexError):
                results.append(images)
                continue
            results.append(
                GenerationResult(
                    request_id=job.request.request_id,
                    base_id=job.request.base_id,
                    images=images,
                    seeds=seeds_of(job.request),
                    adapters=job.applied(),
                    timings=replace(timings, queue_ms=(started - job.submitted_at) * 1e3),
                    compute_s=(swap_ms + outcome.denoise_ms + outcome.decode_ms) / 1e3,
                    device=self._pipeline.device_name,
                    batch_size=batch_size,
                    warnings=warnings,
                )
            )
        return results

    def _abandon(self) -> None:
        """Fail whatever is left, so that nobody waits for ever, however the thread came to its end."""
        with self._changed:
            self._is_closing = True
            left = self._queue.clear()
        for job in left:
            job.end(ReplicaLost(self._pipeline.base_id, attempts=1))


def _denoise_s(endings: Sequence[GenerationResult | Exception]) -> float | None:
    """Return how long a pass denoised, or None where it made nothing."""
    return next((ending.timings.denoise_ms / 1e3 for ending in endings if isinstance(ending, GenerationResult)), None)


def _show(jobs: Sequence[Job], shares: Sequence[tuple[PixelImage, ...]]) -> None:
    for job, images in zip(jobs, shares, strict=True):
        if images:
            job.show(images)


def _without_frames(error: LoraplexError) -> LoraplexError:
    """Return the error without its traceback, whose frames would keep tensors of the device alive."""
    error.__context__ = error.__cause__ = None
    return error.with_traceback(None)
