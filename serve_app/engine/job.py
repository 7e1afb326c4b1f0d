"""One request on its way through the engine, as its submitter and the device thread see it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from serve_app.core import AppliedAdapter, GenerationRequest, GenerationResult
from serve_app.engine.adapter import ParsedAdapter
from serve_app.engine.queue import Waiting

log = logging.getLogger(__name__)

OnProgress = Callable[[int, int], None]


@dataclass(slots=True, eq=False)
class Job:
    """A submitted request. `future` ends in its result, in an error of `serve_app.errors`, or cancelled.

    Cancelling the future is cancelling the job, from any thread and at any time: a waiting job leaves the
    queue, a running one stops at the next step unless others share its pass. `on_progress` is called on the
    device thread with (steps done, steps in all).
    """

    request: GenerationRequest
    adapters: Sequence[tuple[ParsedAdapter, float]]
    waiting: Waiting
    submitted_at: float
    on_progress: OnProgress | None = None
    future: Future[GenerationResult] = field(default_factory=Future)

    def cancel(self) -> bool:
        """Stop wanting the result; False where it is already there."""
        return self.future.cancel()

    @property
    def is_cancelled(self) -> bool:
        """Whether nobody wants the result any more."""
        return self.future.cancelled()

    def end(self, ending: GenerationResult | Exception) -> None:
        """Deliver the result or the error, unless nobody wants it."""
        # Whoever cancels between the two questions is noticed by the second.
        if self.is_cancelled or not self.future.set_running_or_notify_cancel():
            return
        if isinstance(ending, Exception):
            self.future.set_exception(ending)
        else:
            self.future.set_result(ending)

    def report(self, step: int, steps: int) -> None:
        """Tell the submitter how far it is; whatever is wrong with the listener stays with this job."""
        if self.on_progress is None or self.is_cancelled:
            return
        try:
            self.on_progress(step, steps)
        except Exception:
            log.exception("the progress listener of request %s failed and is dropped", self.request.request_id)
            self.on_progress = None

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
