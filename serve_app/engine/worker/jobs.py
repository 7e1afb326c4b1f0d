"""The jobs of one worker: those that wait, in the queue's order, and those that run, with the books of their work.

Owns admission to the queue, deadlines and the choice of what runs next. Must not know threads, pipelines or weights.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field

from serve_app.core import AppliedAdapter, GenerationRequest, GenerationResult, PixelImage, Preview, Progress, Scale
from serve_app.engine.adapters.deltas import ParsedAdapter
from serve_app.engine.worker.pace import LoadStats, LoadTracker
from serve_app.engine.worker.scheduling import (
    FASTEST_SHARE,
    AdapterSetKey,
    Batch,
    BatchKey,
    QueuedRequest,
    QueuePolicy,
    in_order,
    next_batch,
    remaining_after,
    unmeetable_deadlines,
)
from serve_app.errors import DeadlineExceeded, DeadlineOutOfReach, QueueFull
from serve_app.work import work_units


class JobQueue:
    """What a worker has to do. Not thread-safe: whoever calls holds the worker's lock.

    A job is in `running`, or waits, or has been handed out by `drop_expired` or `clear` to be ended.
    """

    def __init__(
        self,
        books: LoadTracker,
        policy: QueuePolicy,
        *,
        max_images: int,
        max_backlog_s: float | None,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
    ) -> None:
        """Start empty; `clock` only grows, `wall_clock` is in seconds since 1970, in which deadlines come."""
        self._books = books
        self._policy = policy
        self._max_images = max_images
        self._max_backlog_s = max_backlog_s
        self._clock = clock
        self._wall_clock = wall_clock
        self._tickets = 0
        self._waiting: list[Job] = []
        self.running: tuple[Job, ...] = ()

    def add(
        self,
        request: GenerationRequest,
        adapters: Sequence[tuple[ParsedAdapter, Scale]],
        key: BatchKey,
        on_event: OnEvent | None,
    ) -> Job:
        """Queue a request and tell it its place.

        Raises:
            DeadlineExceeded: its deadline has passed, or cannot be met with what waits before it.
        """
        now_s = self._clock()
        waiting = QueuedRequest(
            job_id=self._tickets,
            key=key,
            num_images=request.num_images,
            arrived_s=now_s,
            deadline_s=None if request.due is None else now_s + request.due.at - self._wall_clock(),
            priority=request.priority,
            units=work_units(request),
        )
        self._check_deadline(request, waiting)
        job = Job(request, tuple(adapters), waiting, now_s, on_event)
        self._tickets += 1
        self._waiting.append(job)
        self._books.arrived(waiting.units, now_s)
        job.place(len(self.running) + self.waiting().index(job))
        return job

    def check_room(self, request: GenerationRequest) -> None:
        """Refuse a request where there is more work ahead than is accepted.

        Raises:
            QueueFull: so it is; the caller is told when it will be less.
        """
        backlog_s = self._books.backlog_s(self._units(), self._clock())
        if self._max_backlog_s is not None and backlog_s > self._max_backlog_s:
            limit = len(self._units()) + len(self.running)
            raise QueueFull(request.base_id, limit, retry_after_s=max(1, round(backlog_s - self._max_backlog_s)))

    def waiting(self) -> list[Job]:
        """Return the jobs that wait and are still wanted, in order."""
        jobs = {job.waiting.job_id: job for job in self._waiting if not job.is_cancelled}
        return [jobs[item.job_id] for item in in_order((job.waiting for job in jobs.values()), self._policy)]

    def drop_expired(self) -> list[tuple[Job, DeadlineExceeded]]:
        """Take out the jobs whose deadline has passed or cannot be met, each with the error that it is to end in."""
        jobs = self.waiting()
        tickets = set(
            unmeetable_deadlines([job.waiting for job in jobs], now_s=self._clock(), pace=self._books.measured)
        )
        self._waiting = [job for job in jobs if job.waiting.job_id not in tickets]
        late = [(job, job.request.due) for job in jobs if job.waiting.job_id in tickets]
        return [(job, DeadlineExceeded(due.limit_s)) for job, due in late if due is not None]

    def next(self, applied: AdapterSetKey) -> tuple[Job, ...]:
        """Return the jobs of the batch that would run now, with `applied` in the weights; none where none waits."""
        jobs = {job.waiting.job_id: job for job in self._waiting if not job.is_cancelled}
        batch = next_batch(
            (job.waiting for job in jobs.values()),
            applied=applied,
            now_s=self._clock(),
            policy=self._policy,
            max_images=self._max_images,
        )
        return () if batch is None else tuple(jobs[job_id] for job_id in batch.tickets)

    def begin(self, batch: tuple[Job, ...]) -> None:
        """Note that a batch runs, and whom it overtakes."""
        now_s = self._clock()
        tickets = tuple(job.waiting.job_id for job in batch)
        begun = Batch(batch[0].waiting.key, tickets, sum(job.waiting.num_images for job in batch))
        jobs = {job.waiting.job_id: job for job in self._waiting}
        left = remaining_after((job.waiting for job in jobs.values()), begun, now_s=now_s, policy=self._policy)
        self._waiting = [jobs[item.job_id] for item in left]
        for job, item in zip(self._waiting, left, strict=True):
            job.waiting = item
        self.running = batch
        self._books.begun(sum(job.waiting.units for job in batch), now_s)

    def ended(self, *, denoise_s: float | None) -> None:
        """Note that nothing runs any more; `denoise_s` is None where the pass made nothing."""
        self.running = ()
        self._books.ended(self._clock(), denoise_s=denoise_s)

    def clear(self) -> tuple[Job, ...]:
        """Take out everything, and return it."""
        left = (*self.running, *self._waiting)
        self.running, self._waiting = (), []
        return left

    def work(self) -> LoadStats:
        """Return what there is to do, in seconds."""
        return self._books.snapshot(self._units(), self._clock())

    def _units(self) -> list[float]:
        return [job.waiting.units for job in self._waiting if not job.is_cancelled]

    def _check_deadline(self, request: GenerationRequest, waiting: QueuedRequest) -> None:
        """Refuse what has no time left, and what would have none even if all before it ran at twice the pace."""
        if request.due is None or waiting.deadline_s is None:
            return
        left_s = waiting.deadline_s - waiting.arrived_s
        if left_s <= 0:
            raise DeadlineExceeded(request.due.limit_s)
        ahead_s = self._books.backlog_s(self._units(), waiting.arrived_s)
        pace = self._books.measured
        if pace is not None and ahead_s > 0 and FASTEST_SHARE * (ahead_s + pace.seconds(waiting.units)) >= left_s:
            raise DeadlineOutOfReach(request.due.limit_s)


log = logging.getLogger(__name__)

OnEvent = Callable[[Progress | Preview], None]


@dataclass(slots=True, eq=False)
class Job:
    """A submitted request. `future` ends in its result, in an error of `serve_app.errors`, or cancelled.

    Cancelling the future is cancelling the job, from any thread and at any time: a waiting job leaves the
    queue, a running one stops at the next step unless others share its pass. `on_event` is called on the device
    thread, and at submission, with whatever a stream tells. `waiting` is the device thread's to replace.
    """

    request: GenerationRequest
    adapters: Sequence[tuple[ParsedAdapter, Scale]]
    waiting: QueuedRequest
    submitted_at: float
    on_event: OnEvent | None = None
    future: Future[GenerationResult] = field(default_factory=Future)
    is_started: bool = False
    _position: int | None = None
    _previews: int = 0

    def cancel(self) -> bool:
        """Stop wanting the result; False where it is already there."""
        return self.future.cancel()

    @property
    def is_cancelled(self) -> bool:
        """Whether nobody wants the result any more."""
        return self.future.cancelled()

    def end(self, ending: GenerationResult | Exception) -> None:
        """Deliver the result or the error, unless nobody wants it or it has ended; from any thread."""
        # The caller may have left, and a device thread that hung may come back when its jobs have been given up.
        with contextlib.suppress(InvalidStateError):
            if isinstance(ending, Exception):
                self.future.set_exception(ending)
            else:
                self.future.set_result(ending)

    def report(self, step: int, steps: int) -> None:
        """Tell the submitter how far it is; whatever is wrong with a listener stays with this job."""
        self._tell(Progress(0, step, steps))

    def start(self) -> None:
        """Note that its pass begins."""
        self.is_started = True
        self.place(0)

    def place(self, position: int) -> None:
        """Tell the submitter how many requests go before it, if that has changed."""
        if position != self._position:
            self._position = position
            self._tell(Progress(position, 0, self.request.planned_steps))

    def show(self, images: Sequence[PixelImage]) -> None:
        """Give the submitter one preview of each image."""
        for image_index, image in enumerate(images):
            self._tell(Preview(self._previews, image_index, image))
        self._previews += 1

    def _tell(self, event: Progress | Preview) -> None:
        if self.on_event is None or self.is_cancelled:
            return
        try:
            self.on_event(event)
        except Exception:
            log.exception("the listener of request %s failed and is dropped", self.request.request_id)
            self.on_event = None

    def applied(self) -> tuple[AppliedAdapter, ...]:
        """Say what was applied for each adapter of the request."""
        uses = zip(self.request.adapters, self.adapters, strict=True)
        return tuple(
            AppliedAdapter(
                id=use.spec.id,
                revision=use.spec.revision,
                scale=scale,
                layers_matched=adapter.coverage.layers_matched,
                layers_in_file=adapter.coverage.layers_in_file,
            )
            for use, (adapter, scale) in uses
        )
