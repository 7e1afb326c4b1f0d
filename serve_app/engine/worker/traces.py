"""Logs and traces of the device thread's passes: a line and spans for each request.

Owns how a pass is divided among the requests that shared it: each has the whole of it in its own trace. Must not know
whether traces are on.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from serve_app.core import GenerationResult
from serve_app.engine.worker.job import Job
from serve_app.observability.tracing import record

log = logging.getLogger(__name__)


def log_start(jobs: Sequence[Job]) -> None:
    """Log what begins on the device; this thread knows no request, so each line names its own."""
    for job in jobs:
        request_id, base_id = job.request.request_id, job.request.base_id
        log.info(
            "request %s on %s begins on the device, in a pass of %d requests",
            request_id, base_id, len(jobs), extra={"request_id": request_id},
        )  # fmt: skip


def trace_pass(
    jobs: Sequence[Job], endings: Sequence[GenerationResult | Exception], *, began_s: float, ended_s: float
) -> None:
    """Trace a pass that has just ended; its times are those of the jobs' clock."""
    for job, ending in zip(jobs, endings, strict=True):
        trace = job.request.trace
        if trace is None:
            continue
        record("queue", trace, began_ago_s=ended_s - job.submitted_at, lasted_s=began_s - job.submitted_at)
        if isinstance(ending, GenerationResult):
            _trace_image(job, ending, began_s=began_s, ended_s=ended_s)
        else:
            took_s = ended_s - began_s
            record("pass", trace, began_ago_s=took_s, lasted_s=took_s, error=ending, requests=len(jobs))


def trace_dropped(job: Job, error: Exception, *, now_s: float) -> None:
    """Trace a job that leaves the queue without a pass."""
    waited_s = now_s - job.submitted_at
    record("queue", job.request.trace, began_ago_s=waited_s, lasted_s=waited_s, error=error)


def _trace_image(job: Job, result: GenerationResult, *, began_s: float, ended_s: float) -> None:
    request, timings = job.request, result.timings
    swap_s, denoise_s, decode_s = timings.swap_ms / 1e3, timings.denoise_ms / 1e3, timings.decode_ms / 1e3
    pass_s, suspended_s = ended_s - began_s, timings.suspended_ms / 1e3
    # Decoding comes last and denoising right before it: all other work of a pass lies between swap and denoising.
    record("swap", request.trace, began_ago_s=pass_s, lasted_s=swap_s)
    record(
        "denoise", request.trace, began_ago_s=suspended_s + denoise_s + decode_s, lasted_s=suspended_s + denoise_s,
        steps=request.planned_steps, images=result.batch_size,
        pixels=request.width * request.height * result.batch_size, suspended_ms=round(timings.suspended_ms),
    )  # fmt: skip
    record("decode", request.trace, began_ago_s=decode_s, lasted_s=decode_s, images=result.batch_size)
