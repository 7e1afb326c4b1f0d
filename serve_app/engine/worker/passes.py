"""A batch on the device: in one pass, or in several where memory does not suffice for one.

Owns who gets which images of which pass. Must not know adapters, the queue or threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from serve_app.core import GenerationRequest, GenerationResult, PixelImage, Timings
from serve_app.engine.drawing.arguments import seeds_of
from serve_app.engine.drawing.pipeline import BasePipeline
from serve_app.engine.drawing.steps import BetweenSteps, GenerationCancelled
from serve_app.engine.worker.job import Job
from serve_app.engine.worker.jobs import Run
from serve_app.engine.worker.memory import OomRecovery
from serve_app.errors import LoraplexError, OutOfMemory, ReplicaLost

# Called with the jobs of the pass that runs, the steps done and the steps in all.
OnJobsStep = Callable[[Sequence[Job], int, int], None]


@dataclass(slots=True)
class JobOutput:
    """The images of one job so far; `largest_pass` is the number of images in its largest pass."""

    job: Job
    images: list[PixelImage] = field(default_factory=list[PixelImage])
    warnings: tuple[str, ...] = ()
    largest_pass: int = 0
    error: LoraplexError | None = None

    @property
    def is_wanted(self) -> bool:
        """Whether more should be drawn of it."""
        return self.error is None and not self.job.is_cancelled

    def take(self, images: tuple[PixelImage, ...] | LoraplexError, warnings: tuple[str, ...], pass_images: int) -> None:
        """Add what came of one pass."""
        self.warnings = tuple(dict.fromkeys((*self.warnings, *warnings)))
        self.largest_pass = max(self.largest_pass, pass_images)
        if isinstance(images, LoraplexError):
            self.error = images
        else:
            self.images.extend(images)


@dataclass(frozen=True, slots=True)
class BatchOutput:
    """The result of a batch: a share for each job, and the time on the device in all its passes together."""

    shares: tuple[JobOutput, ...]
    denoise_ms: float
    decode_ms: float


class BatchRunner:
    """Draws batches. A job whose images did not fit beside others is drawn again, image by image, once."""

    def __init__(
        self,
        pipeline: BasePipeline,
        memory: OomRecovery,
        *,
        bind: Callable[[], None],
        on_step: OnJobsStep,
        between_steps: BetweenSteps,
        is_aborting: Callable[[], bool],
    ) -> None:
        """`bind` sees to it that the batch's adapters are applied."""
        self._pipeline = pipeline
        self._memory = memory
        self._bind = bind
        self._on_step = on_step
        self._between_steps = between_steps
        self._is_aborting = is_aborting
        self._denoise_ms = self._decode_ms = 0.0

    def draw(self, jobs: Sequence[Job], ti_tokens: Mapping[str, Tensor]) -> BatchOutput:
        """Run jobs that share a batch key; `ti_tokens` are their adapter's tokens.

        Raises:
            GenerationCancelled: the worker is aborting.
        """
        self._denoise_ms = self._decode_ms = 0.0
        shares = tuple(JobOutput(job) for job in jobs)
        pixels = jobs[0].request.width * jobs[0].request.height
        most = self._memory.max_images_per_pass(pixels)
        if most is None:
            self._memory.resume_prefetch()
        most = self._pipeline.max_images_per_pass or most
        for whole in split_into_passes([job.request.num_images for job in jobs], most):
            if not self._memory.try_run(lambda whole=whole: self._draw(whole, shares, ti_tokens, is_again=False)):
                self._memory.on_oom(images_in(whole) * pixels)
                self._draw_again(whole, shares, ti_tokens)
        for share in shares:
            if share.error is None and len(share.images) < share.job.request.num_images:
                share.error = ReplicaLost(self._pipeline.base_id, attempts=1)  # given up by its caller
        return BatchOutput(shares, self._denoise_ms, self._decode_ms)

    def _draw_again(self, whole: Pass, shares: Sequence[JobOutput], ti_tokens: Mapping[str, Tensor]) -> None:
        is_recovered = True
        for single in split_per_image(whole):
            if not self._memory.try_run(lambda single=single: self._draw(single, shares, ti_tokens, is_again=True)):
                is_recovered = False
                share = shares[single[0].request_index]
                share.error = out_of_memory(share.job)
                self._memory.free_memory()
        self._memory.count(is_recovered=is_recovered)

    def _draw(
        self, whole: Pass, shares: Sequence[JobOutput], ti_tokens: Mapping[str, Tensor], *, is_again: bool
    ) -> None:
        parts = [part for part in whole if shares[part.request_index].is_wanted]
        if not parts:
            return
        jobs = [shares[part.request_index].job for part in parts]
        self._bind()
        try:
            outcome = self._pipeline.generate(
                [part.of(job.request) for part, job in zip(parts, jobs, strict=True)],
                on_step=lambda step, steps: self._on_step(jobs, step, steps),
                is_cancelled=lambda: self._is_aborting() or all(job.is_cancelled for job in jobs),
                on_preview=None if is_again else lambda images: _show(jobs, images),
                between_steps=self._between_steps,
                ti_tokens=ti_tokens,
            )
        except GenerationCancelled:
            if self._is_aborting():
                raise
            return
        self._denoise_ms += outcome.denoise_ms
        self._decode_ms += outcome.decode_ms
        for part, images, warnings in zip(parts, outcome.images, outcome.warnings, strict=True):
            shares[part.request_index].take(images, warnings, images_in(tuple(parts)))


def out_of_memory(job: Job) -> OutOfMemory:
    """Return the error of a job whose images do not fit, not even one at a time."""
    request = job.request
    size = f"{request.width}x{request.height}"
    what = f"an image of {size}" if request.num_images == 1 else f"{request.num_images} images of {size}"
    return OutOfMemory(request.base_id, what, advice="ask for a smaller size or fewer images")


def out_of_memory_for_adapters(job: Job) -> OutOfMemory:
    """Return the error of a job whose adapters cannot be applied for lack of memory."""
    names = " with ".join(use.spec.id for use in job.request.adapters) or "the base's own weights"
    return OutOfMemory(job.request.base_id, names, advice="ask for fewer adapters or a smaller one")


def _show(jobs: Sequence[Job], shares: Sequence[tuple[PixelImage, ...]]) -> None:
    for job, images in zip(jobs, shares, strict=True):
        if images:
            job.show(images)


@dataclass(frozen=True, slots=True)
class RequestSlice:
    """Images of one request: `count` of them from number `first` on; `request_index` is the request's in its batch."""

    request_index: int
    first: int
    count: int

    def of(self, request: GenerationRequest) -> GenerationRequest:
        """Return the request for these images alone, each with the seed that it has in the whole.

        A part of a request asks for no previews, as a caller could not tell which images they show.
        """
        part = request.part(self.first, self.count)
        return part if part is request else replace(part, num_previews=0)


Pass = tuple[RequestSlice, ...]


def split_into_passes(counts: Sequence[int], at_most: int | None) -> tuple[Pass, ...]:
    """Cut requests with so many images each into passes of at most so many images, in order; None for one pass."""
    if at_most is None or sum(counts) <= at_most:
        return (tuple(RequestSlice(request_index, 0, count) for request_index, count in enumerate(counts)),)
    return tuple(_passes(counts, at_most))


def split_per_image(whole: Pass) -> tuple[Pass, ...]:
    """Cut a pass into passes of one image."""
    return tuple((RequestSlice(part.request_index, part.first + n, 1),) for part in whole for n in range(part.count))


def images_in(whole: Pass) -> int:
    """Return how many images a pass draws."""
    return sum(part.count for part in whole)


def _passes(counts: Sequence[int], at_most: int) -> Iterator[Pass]:
    pending: list[RequestSlice] = []
    free = at_most
    for request_index, count in enumerate(counts):
        first = 0
        while first < count:
            taken = min(count - first, free)
            pending.append(RequestSlice(request_index, first, taken))
            first, free = first + taken, free - taken
            if not free:
                yield tuple(pending)
                pending, free = [], at_most
    if pending:
        yield tuple(pending)


def results_of(drawn: BatchOutput, run: Run, *, device: str) -> list[GenerationResult | Exception]:
    """Return each job's result or error; the times, queueing apart, are those of the whole batch."""
    timings = Timings(
        swap_ms=run.swap_s * 1e3,
        suspended_ms=run.suspended_s * 1e3,
        denoise_ms=drawn.denoise_ms,
        decode_ms=drawn.decode_ms,
    )
    return [share.error or _result(share, timings, device, run.began_s) for share in drawn.shares]


def denoise_s(endings: Sequence[GenerationResult | Exception]) -> float | None:
    """Return how long a pass denoised, or None where it made nothing."""
    return next((ending.timings.denoise_ms / 1e3 for ending in endings if isinstance(ending, GenerationResult)), None)


def _result(share: JobOutput, timings: Timings, device: str, started_s: float) -> GenerationResult:
    job = share.job
    return GenerationResult(
        request_id=job.request.request_id,
        base_id=job.request.base_id,
        images=tuple(share.images),
        seeds=seeds_of(job.request),
        adapters=job.applied(),
        timings=replace(timings, queue_ms=(started_s - job.submitted_at) * 1e3),
        compute_s=(timings.swap_ms + timings.denoise_ms + timings.decode_ms) / 1e3,
        device=device,
        batch_size=share.largest_pass,
        warnings=share.warnings,
    )
