"""A submitted request on its way through a worker, and what its submitter hears of it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field

from serve_app.core import AppliedAdapter, GenerationRequest, GenerationResult, PixelImage, Preview, Progress, Scale
from serve_app.engine.adapters.deltas import ParsedAdapter
from serve_app.engine.worker.scheduling import QueuedRequest

log = logging.getLogger(__name__)

OnEvent = Callable[[Progress | Preview], None]


@dataclass(slots=True, eq=False)
class Job:
    """A submitted request. `future` ends in its result, in an error of `serve_app.errors`, or cancelled.

    Cancelling the future is cancelling the job, from any thread and at any time: a waiting job leaves the
    queue, a running one stops at the next step unless others share its pass. `on_event` is called on the device
    thread, and at submission, with each event of a stream. `waiting` is the device thread's to replace.
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
    _step: int = 0

    def cancel(self) -> bool:
        """Stop wanting the result; False where it is already there."""
        return self.future.cancel()

    @property
    def is_cancelled(self) -> bool:
        """Whether no caller waits for the result any more."""
        return self.future.done()

    def end(self, ending: GenerationResult | Exception) -> None:
        """Deliver the result or the error, unless it was cancelled or has ended; from any thread."""
        # The caller may have left, and a device thread that hung may come back when its jobs have been given up.
        with contextlib.suppress(InvalidStateError):
            if isinstance(ending, Exception):
                self.future.set_exception(ending)
            else:
                self.future.set_result(ending)

    def report(self, step: int, steps: int) -> None:
        """Tell the submitter how far it is; a failing listener affects only this job."""
        self._step = step
        self._position = 0
        self._tell(Progress(0, step, steps))

    def set_aside(self) -> None:
        """Tell the submitter that others have the device before its next step."""
        self._position = 1
        self._tell(Progress(1, self._step, self.request.planned_steps))

    def start(self) -> None:
        """Note that its pass begins."""
        self.is_started = True
        self._step = 0
        self.report_position(0)

    def report_position(self, position: int) -> None:
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


def ids_of(jobs: Sequence[Job]) -> str:
    """Return the ids of jobs' requests, for a line of the log."""
    return ", ".join(job.request.request_id for job in jobs)
