"""The jobs of one worker: those that wait, and those whose pass has begun, with the books of their work.

Owns admission to the queue, deadlines and the choice of what runs next. Must not know threads, pipelines or weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass

from serve_app.core import GenerationRequest, Scale
from serve_app.engine.adapters.deltas import ParsedAdapter
from serve_app.engine.worker.job import Job, OnEvent
from serve_app.engine.worker.pace import LoadStats, LoadTracker
from serve_app.engine.worker.scheduling import (
    FASTEST_SHARE,
    AdapterSetKey,
    Batch,
    BatchKey,
    QueuedRequest,
    QueuePolicy,
    batch_of,
    in_order,
    next_batch,
    remaining_after,
    unmeetable_deadlines,
)
from serve_app.engine.worker.swap_timer import SwapTimer
from serve_app.engine.worker.turns import ChooseTurn, Claim, DeviceBooks, SharingPolicy, next_claim, ranked
from serve_app.errors import DeadlineExceeded, DeadlineOutOfReach, QueueFull
from serve_app.work import work_units


@dataclass(slots=True, eq=False)
class Run:
    """Jobs that share a pass that has begun; `left` is the part of its work that is still to come.

    `swap_s` and `suspended_s` are how long changes to its adapters took, and how long others had the device.
    """

    jobs: tuple[Job, ...]
    units: float
    began_s: float
    left: float = 1.0
    swap_s: float = 0.0
    suspended_s: float = 0.0

    @property
    def ticket(self) -> int:
        """The ticket of its first job."""
        return self.jobs[0].waiting.job_id

    @property
    def adapters(self) -> Sequence[tuple[ParsedAdapter, Scale]]:
        """The adapters that it is drawn with."""
        return self.jobs[0].adapters

    @property
    def composition(self) -> AdapterSetKey:
        """The key of its adapters and their scales."""
        return self.jobs[0].waiting.key.composition

    @property
    def is_wanted(self) -> bool:
        """Whether a caller waits for one of its jobs."""
        return not all(job.is_cancelled for job in self.jobs)


class JobQueue:
    """The jobs of a worker, waiting and running. Not thread-safe: the caller holds the worker's lock.

    A job waits, or is in one of `runs`, or has been handed out by `drop_expired`, `ended` or `clear` to be ended.
    Without `sharing` a run has the device from its beginning to its end.
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
        sharing: SharingPolicy | None = None,
        choose: ChooseTurn = next_claim,
        record_event: Callable[[], object] | None = None,
    ) -> None:
        """Start empty; `clock` only grows, `wall_clock` is in seconds since 1970, in which deadlines come.

        `record_event` is what `SwapTimer` takes.
        """
        self._books = books
        self._policy = policy
        self._sharing = sharing
        self._choose = choose
        self._max_images = max_images
        self._max_backlog_s = max_backlog_s
        self._clock = clock
        self._wall_clock = wall_clock
        self._tickets = 0
        self._waiting: list[Job] = []
        self._holder: int | None = None
        self._worked_until_s = 0.0
        self._swaps = SwapTimer[Run](clock, record_event)
        self.runs: list[Run] = []
        self.device_books = DeviceBooks()

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
        arrived_s = now_s - request.waited_s
        waiting = QueuedRequest(
            job_id=self._tickets,
            key=key,
            num_images=request.num_images,
            arrived_s=arrived_s,
            deadline_s=None if request.due is None else now_s + request.due.at - self._wall_clock(),
            priority=request.priority,
            units=work_units(request),
        )
        job = Job(request, tuple(adapters), waiting, arrived_s, on_event)
        self._check_deadline(job)
        others = {other.request.share for other in (*self.running, *self._waiting)}
        work_s = self._books.pace.seconds(waiting.units) / request.share_weight
        self.device_books.arrived(request.share, work_s, others)
        self._tickets += 1
        self._waiting.append(job)
        self._books.arrived(waiting.units, now_s)
        job.report_position(len(self.running) + self.waiting().index(job))
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

    @property
    def running(self) -> tuple[Job, ...]:
        """The jobs whose pass has begun."""
        return tuple(job for run in self.runs for job in run.jobs)

    @property
    def num_suspended(self) -> int:
        """How many jobs have begun and not the device."""
        return sum(len(run.jobs) for run in self.runs if run.ticket != self._holder)

    def waiting(self) -> list[Job]:
        """Return the jobs that wait and are still wanted, in the order in which they would run."""
        jobs = {job.waiting.job_id: job for job in self._waiting if not job.is_cancelled}
        if self._sharing is None:
            return [jobs[item.job_id] for item in in_order((job.waiting for job in jobs.values()), self._policy)]
        claims = self._ranked(map(self._claim_of, jobs.values()), self._sharing)
        return [jobs[claim.ticket] for claim in claims]

    def drop_expired(self) -> list[tuple[Job, DeadlineExceeded]]:
        """Return the jobs whose deadline has passed or cannot be met, each with the error that it is to end in.

        Waiting jobs are taken out; a run ends by itself once none of its jobs is wanted.
        """
        jobs = self.waiting()
        tickets = set(
            unmeetable_deadlines([job.waiting for job in jobs], now_s=self._clock(), pace=self._books.measured)
        )
        self._waiting = [job for job in jobs if job.waiting.job_id not in tickets]
        late = [job for job in jobs if job.waiting.job_id in tickets]
        if self._sharing is not None:
            late += [job for job in self.running if not job.is_cancelled and self._is_past_deadline(job)]
        return [(job, DeadlineExceeded(job.request.due.limit_s)) for job in late if job.request.due is not None]

    def drop_cancelled(self) -> None:
        """Take out the jobs that were given up before their pass began."""
        self._waiting = [job for job in self._waiting if not job.is_cancelled]

    def give_back(self, keep_s: float) -> list[Job]:
        """Take out what would run last, until no more than `keep_s` of work is left or all that is left has begun."""
        given: list[Job] = []
        for job in reversed(self.waiting()):
            if self._books.backlog_s(self._units(), self._clock()) <= keep_s:
                break
            self._waiting.remove(job)
            given.append(job)
        return given

    def next(self, applied: AdapterSetKey) -> tuple[Job, ...]:
        """Return the jobs of the batch that would begin now, with `applied` in the weights; none where none waits."""
        jobs = {job.waiting.job_id: job for job in self._waiting if not job.is_cancelled}
        batch = next_batch(
            (job.waiting for job in jobs.values()),
            applied=applied,
            now_s=self._clock(),
            policy=self._policy,
            max_images=self._max_images,
        )
        return () if batch is None else tuple(jobs[job_id] for job_id in batch.tickets)

    def take_turn(self, applied: AdapterSetKey) -> Run | None:
        """Give the device to the run that is to have it, begun or not; None where there is nothing to do."""
        if self._sharing is None:
            jobs = self.next(applied)
            return self.begin(jobs) if jobs else None
        run = next((run for run in self.runs if not run.is_wanted), None)  # ends at once, and makes room
        if run is None:
            claim = self._next_claim(applied, self._holder, self._sharing)
            if claim is None:
                return None
            run = next((run for run in self.runs if run.ticket == claim.ticket), None)
            if run is None:
                return self.begin(self._batch_of(claim))
        self._hold(run)
        self._books.resumed(self._clock(), run.ticket)
        return run

    def is_to_suspend(self, run: Run, applied: AdapterSetKey) -> bool:
        """Whether another should have the device before the next step of a run."""
        if self._sharing is None or not (self._waiting or len(self.runs) > 1):
            return False
        if any(not other.is_wanted for other in self.runs):
            return True
        claim = self._next_claim(applied, run.ticket, self._sharing)
        return claim is not None and claim.ticket != run.ticket

    def upcoming(self, applied: AdapterSetKey) -> Sequence[tuple[ParsedAdapter, Scale]]:
        """Return the adapters that will probably be needed next; none where nothing else is to be done."""
        if self._sharing is None:
            jobs = self.next(applied)
            return jobs[0].adapters if jobs else ()
        others = [claim for claim in self._claims() if claim.ticket != self._holder]
        claim = next_claim(
            others, holder=None, applied=applied, now_s=self._clock(), books=self.device_books, policy=self._sharing
        )
        if claim is None:
            return ()
        return next(job.adapters for job in (*self.running, *self._waiting) if job.waiting.job_id == claim.ticket)

    def begin(self, batch: tuple[Job, ...]) -> Run:
        """Note that a batch runs, and whom it overtakes."""
        now_s = self._clock()
        tickets = tuple(job.waiting.job_id for job in batch)
        begun = Batch(batch[0].waiting.key, tickets, sum(job.waiting.num_images for job in batch))
        jobs = {job.waiting.job_id: job for job in self._waiting}
        left = remaining_after((job.waiting for job in jobs.values()), begun, now_s=now_s, policy=self._policy)
        self._waiting = [jobs[item.job_id] for item in left]
        for job, item in zip(self._waiting, left, strict=True):
            job.waiting = item
        run = Run(batch, sum(job.waiting.units for job in batch), now_s)
        self.runs.append(run)
        self._hold(run)
        self._books.begun(run.units, now_s, run.ticket)
        return run

    def advanced(self, run: Run, left: float) -> None:
        """Note that a run has had the device until now, and which part of its work is left."""
        self._note_swaps()
        now_s = self._clock()
        run.left = left
        self.device_books.worked(_parts_of(run.jobs), now_s - self._worked_until_s, now_s)
        self._worked_until_s = now_s

    def changing(self) -> None:
        """Note that a change of adapters begins."""
        self._swaps.begin()

    def changed(self, run: Run, *, kept: Set[AdapterSetKey]) -> None:
        """Note that the change was made, to the adapters of a run; `kept` are those that a change is cheap to now."""
        self._swaps.end(run, was_kept=run.composition in self.device_books.kept)
        self.device_books.kept = kept
        self._note_swaps()
        self._worked_until_s = self._clock()

    def _note_swaps(self) -> None:
        """Put down the changes that the device is through with."""
        for swap in self._swaps.finished():
            swap.owner.swap_s += swap.seconds
            self.device_books.changed(swap.seconds, was_kept=swap.was_kept)

    def suspended(self, run: Run) -> None:
        """Note that a run stands still."""
        self._books.suspended(self._clock(), run.ticket)

    def ended(self, run: Run, *, denoise_s: float | None) -> None:
        """Note that a run is over; `denoise_s` is None where it made nothing."""
        self.advanced(run, 0.0)
        self._holder = None
        self.runs = [other for other in self.runs if other is not run]
        self._books.ended(self._clock(), run.ticket, denoise_s=denoise_s)

    def clear(self) -> tuple[Job, ...]:
        """Take out everything, and return it."""
        left = (*self.running, *self._waiting)
        self.runs, self._waiting = [], []
        return left

    def work(self) -> LoadStats:
        """Return what there is to do, in seconds."""
        return self._books.snapshot(self._units(), self._clock())

    def _hold(self, run: Run) -> None:
        self._holder = run.ticket
        self._worked_until_s = self._clock()

    def _next_claim(self, applied: AdapterSetKey, holder: int | None, sharing: SharingPolicy) -> Claim | None:
        return self._choose(
            self._claims(), holder=holder, applied=applied, now_s=self._clock(), books=self.device_books, policy=sharing
        )

    def _ranked(self, claims: Iterable[Claim], sharing: SharingPolicy) -> list[Claim]:
        return ranked(claims, applied=(), now_s=self._clock(), books=self.device_books, policy=sharing)

    def _claims(self) -> list[Claim]:
        waiting = [self._claim_of(job) for job in self._waiting if not job.is_cancelled]
        return [*map(self._claim_of_run, self.runs), *waiting]

    def _claim_of(self, job: Job) -> Claim:
        item, whole_s = job.waiting, self._books.pace.seconds(job.waiting.units)
        return Claim(
            item.job_id, item.key.composition, item.arrived_s, whole_s, whole_s, job.request.share, item.priority,
            times_part=_times_part(job),
        )  # fmt: skip

    def _claim_of_run(self, run: Run) -> Claim:
        """Return the claim of a pass: as urgent as the most urgent of those who share it."""
        whole_s, pace = self._books.pace.seconds(run.units), self._books.pace
        return Claim(
            run.ticket,
            run.composition,
            arrived_s=min(job.waiting.arrived_s for job in run.jobs),
            remaining_s=pace.seconds(run.units * run.left),
            whole_s=whole_s,
            share=min((job.request.share for job in run.jobs), key=self.device_books.had_s),
            priority=max(job.waiting.priority for job in run.jobs),
            is_begun=True,
            times_part=min(map(_times_part, run.jobs)),
        )

    def _batch_of(self, claim: Claim) -> tuple[Job, ...]:
        jobs = {job.waiting.job_id: job for job in self.waiting()}
        order = [job.waiting for job in jobs.values()]
        batch = batch_of(jobs[claim.ticket].waiting, order, max_images=self._max_images)
        return tuple(jobs[ticket] for ticket in batch.tickets)

    def _is_past_deadline(self, job: Job) -> bool:
        return job.waiting.deadline_s is not None and self._clock() >= job.waiting.deadline_s

    def _units(self) -> list[float]:
        return [job.waiting.units for job in self._waiting if not job.is_cancelled]

    def _check_deadline(self, job: Job) -> None:
        """Refuse what has no time left, and what would have none even if all before it ran at twice the pace."""
        due, item = job.request.due, job.waiting
        if due is None or item.deadline_s is None:
            return
        left_s = item.deadline_s - self._clock()
        if left_s <= 0:
            raise DeadlineExceeded(due.limit_s)
        ahead_s, pace = self._ahead_s(job), self._books.measured
        if pace is not None and ahead_s > 0 and FASTEST_SHARE * (ahead_s + pace.seconds(item.units)) >= left_s:
            raise DeadlineOutOfReach(due.limit_s)

    def _ahead_s(self, job: Job) -> float:
        """Return the work that goes before a request that comes now."""
        if self._sharing is None:
            return self._books.backlog_s(self._units(), self._clock())
        claims = self._ranked([*self._claims(), self._claim_of(job)], self._sharing)
        places = [claim.ticket for claim in claims]
        return sum(claim.remaining_s for claim in claims[: places.index(job.waiting.job_id)])


def _parts_of(jobs: Sequence[Job]) -> dict[str, float]:
    """Return each caller's part of a pass, by images, over its weight."""
    images = sum(job.waiting.num_images for job in jobs)
    parts = {job.request.share: 0.0 for job in jobs}
    for job in jobs:
        parts[job.request.share] += job.waiting.num_images / images / job.request.share_weight
    return parts


def _times_part(job: Job) -> float:
    """Return the work of a whole request over that of the part that a job is."""
    return (job.request.whole_images or job.request.num_images) / job.request.num_images
