"""The device of a simulated replica: whole passes one after the other, or passes that take turns between steps.

Owns when which pass has the device. The engine's own functions decide what runs next; this file lets time pass
between their decisions. Must not know where requests come from or what is fetched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from serve_app.bench.simulation.job import Job, Setting
from serve_app.engine.worker.scheduling import AdapterSetKey, QueuedRequest, batch_of, next_batch, remaining_after
from serve_app.engine.worker.turns import Claim, DeviceBooks, next_claim, ranked

# Called with a time, a function and its argument: the function is to run then.
Schedule = Callable[[float, Callable[..., None], object], None]


class Counts:
    """The counts of all replicas of a run."""

    def __init__(self) -> None:
        self.fetches = 0
        self.disk_reads = 0
        self.swaps = 0
        self.passes = 0
        self.busy_s = 0.0


@dataclass(frozen=True, slots=True)
class Surroundings:
    """The interface that a device needs of its replica.

    `on_done` hears the jobs of a pass that has ended, `late_fetch_s` fetches at a job's turn and says how long that
    takes, `set_backlog` is told the work of all passes but the running one, and when that ends. `chance` is a factor
    around one for what no prediction knows.
    """

    setting: Setting
    counts: Counts
    schedule: Schedule
    on_done: Callable[[Sequence[Job], float], None]
    late_fetch_s: Callable[[Job, float], float]
    set_backlog: Callable[[float, float], None]
    chance: Callable[[], float]


class _Swaps:
    """The composition in the weights, and the time of a change."""

    def __init__(self, around: Surroundings) -> None:
        self.applied: AdapterSetKey = ()
        self._around = around

    def swap_s(self, job: Job) -> float:
        """Apply a job's adapters and return how long that takes."""
        if job.key.composition == self.applied:
            return 0.0
        setting = self._around.setting
        self.applied = job.key.composition
        self._around.counts.swaps += 1
        if setting.swap_s is not None:
            return setting.swap_s
        costs = setting.profile.costs
        sizes = [need.size_bytes for need in job.demand.adapters]
        return costs.swap.seconds(sum(sizes)) + sum(costs.to_device.seconds(size) for size in sizes)


class WholePasses:
    """A device that ends each pass before it begins the next."""

    def __init__(self, around: Surroundings) -> None:
        self._around = around
        self._swaps = _Swaps(around)
        self._jobs: dict[int, Job] = {}
        self._waiting: list[QueuedRequest] = []
        self._is_running = False

    def enqueue(self, job: Job, now_s: float) -> None:
        """Have a job wait for its pass."""
        self._jobs[job.ticket] = job
        self._waiting.append(job.queued)
        if not self._is_running:
            self._begin(now_s)

    def give_back(self, keep_s: float, now_s: float) -> list[Job]:
        """Give nothing back."""
        return []

    def _begin(self, now_s: float) -> None:
        around, setting = self._around, self._around.setting
        batch = next_batch(
            self._waiting,
            applied=self._swaps.applied,
            now_s=now_s,
            policy=setting.queue,
            max_images=setting.profile.max_batch_images,
        )
        if batch is None:
            return
        self._waiting = remaining_after(self._waiting, batch, now_s=now_s, policy=setting.queue)
        jobs = [self._jobs.pop(ticket) for ticket in batch.tickets]
        took_s = around.late_fetch_s(jobs[0], now_s) + self._swaps.swap_s(jobs[0])
        took_s += setting.timings.pace.seconds(sum(job.demand.units for job in jobs)) * around.chance()
        self._is_running = True
        around.set_backlog(sum(job.predicted_s for job in self._jobs.values()), now_s + took_s)
        around.counts.passes += 1
        around.counts.busy_s += took_s
        around.schedule(now_s + took_s, self._ended, jobs)

    def _ended(self, jobs: list[Job], now_s: float) -> None:
        self._is_running = False
        self._begin(now_s)
        self._around.on_done(jobs, now_s)


@dataclass(slots=True, eq=False)
class _Course:
    """A pass on its way: predicted times. `factor` is how much longer it really takes."""

    jobs: list[Job]
    whole_s: float
    step_s: float
    fixed_s: float
    left_s: float
    factor: float = 1.0
    is_begun: bool = False

    def claim(self) -> Claim:
        head = self.jobs[0]
        arrived_s = min(job.at_s for job in self.jobs)
        return Claim(
            head.ticket, head.key.composition, arrived_s, self.left_s, self.whole_s, is_begun=self.is_begun,
            times_part=min(job.times_part for job in self.jobs),
        )  # fmt: skip

    def steps_s(self, seconds: float) -> float:
        """Return the end of the step that `seconds` from now lie in, from now; decoding is not interrupted."""
        if self.step_s <= 0:
            return self.left_s
        end_s = max(math.ceil(seconds / self.step_s - 1e-9), 1) * self.step_s
        return end_s if self.left_s - end_s > self.fixed_s + 1e-9 else self.left_s


@dataclass(slots=True, eq=False)
class _Slice:
    """A pass on the device: from `began_s`, its change of adapters apart, for `predicted_s` of its time."""

    course: _Course
    began_s: float
    predicted_s: float

    @property
    def end_s(self) -> float:
        return self.began_s + self.predicted_s * self.course.factor


class SharedSteps:
    """A device whose passes take turns between steps."""

    def __init__(self, around: Surroundings) -> None:
        self._around = around
        self._swaps = _Swaps(around)
        self._books = DeviceBooks()
        self._courses: dict[int, _Course] = {}
        self._slice: _Slice | None = None
        self._holder: int | None = None

    def enqueue(self, job: Job, now_s: float) -> None:
        """Have a job wait for its turn; the running pass is asked again after its step."""
        pace, units = self._around.setting.timings.pace, job.demand.units
        step_s = pace.unit_s * units / max(job.steps, 1)
        self._courses[job.ticket] = _Course([job], job.predicted_s, step_s, pace.fixed_s, job.predicted_s)
        if self._slice is None:
            self._next(now_s)
            return
        running = self._slice
        passed_s = max(now_s - running.began_s, 0.0) / running.course.factor
        self._run(_Slice(running.course, running.began_s, min(running.predicted_s, running.course.steps_s(passed_s))))

    def give_back(self, keep_s: float, now_s: float) -> list[Job]:
        """Take out what would run last, until no more than `keep_s` of work is left or all that is left has begun."""
        waiting = [course.claim() for course in self._courses.values() if not course.is_begun]
        order = ranked(waiting, applied=(), now_s=now_s, books=self._books, policy=self._around.setting.sharing)
        given: list[Job] = []
        while order and sum(course.left_s for course in self._courses.values()) > keep_s:
            given += self._courses.pop(order.pop().ticket).jobs
        return given

    def _next(self, now_s: float) -> None:
        setting = self._around.setting
        claim = next_claim(
            [course.claim() for course in self._courses.values()],
            holder=self._holder, applied=self._swaps.applied, now_s=now_s, books=self._books, policy=setting.sharing,
        )  # fmt: skip
        if claim is None:
            return
        course = self._courses[claim.ticket]
        if not course.is_begun:
            self._begin(course)
        swap_s = self._swaps.swap_s(course.jobs[0])
        if swap_s:
            self._books.changed(swap_s)
            self._around.counts.busy_s += swap_s
        self._holder = claim.ticket
        alone = len(self._courses) == 1
        self._run(_Slice(course, now_s + swap_s, course.left_s if alone else course.steps_s(0.0)))

    def _begin(self, course: _Course) -> None:
        """Begin a pass, with those that wait and can share it."""
        setting = self._around.setting
        waiting = {number: other.jobs[0] for number, other in self._courses.items() if not other.is_begun}
        head = course.jobs[0]
        batch = batch_of(
            head.queued, [job.queued for job in waiting.values()], max_images=setting.profile.max_batch_images
        )
        course.jobs = [waiting[ticket] for ticket in batch.tickets]
        for ticket in batch.tickets[1:]:
            del self._courses[ticket]
        units = sum(job.demand.units for job in course.jobs)
        course.whole_s = course.left_s = setting.timings.pace.seconds(units)
        course.step_s = setting.timings.pace.unit_s * units / max(head.steps, 1)
        course.factor, course.is_begun = self._around.chance(), True
        self._around.counts.passes += 1

    def _run(self, piece: _Slice) -> None:
        self._slice = piece
        others_s = sum(course.left_s for course in self._courses.values() if course is not piece.course)
        self._around.set_backlog(others_s, piece.began_s + piece.course.left_s * piece.course.factor)
        self._around.schedule(piece.end_s, self._passed, piece)

    def _passed(self, piece: _Slice, now_s: float) -> None:
        if piece is not self._slice:
            return  # it was cut short
        course, self._slice = piece.course, None
        course.left_s -= piece.predicted_s
        took_s = piece.predicted_s * course.factor
        self._books.worked({"": 1.0}, took_s, now_s)
        self._around.counts.busy_s += took_s
        is_over = course.left_s <= 1e-9
        if is_over:
            del self._courses[course.jobs[0].ticket]
            self._holder = None
        self._next(now_s)
        if is_over:
            self._around.on_done(course.jobs, now_s)
