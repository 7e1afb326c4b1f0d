"""From what a batch drew to what each of its requests is told. Pure."""

from __future__ import annotations

from dataclasses import replace

from serve_app.core import GenerationResult, Timings
from serve_app.engine.passes import Drawn, Share
from serve_app.engine.pipeline import seeds_of


def results_of(drawn: Drawn, *, device: str, started_s: float, applied_s: float) -> list[GenerationResult | Exception]:
    """Return each job's result or error.

    The times, queueing apart, are those of the whole batch, which began at `started_s` and had its adapters applied
    at `applied_s`, on the clock of the jobs' submission.
    """
    swap_ms = (applied_s - started_s) * 1e3
    timings = Timings(swap_ms=swap_ms, denoise_ms=drawn.denoise_ms, decode_ms=drawn.decode_ms)
    return [share.error or _result(share, timings, device, started_s) for share in drawn.shares]


def _result(share: Share, timings: Timings, device: str, started_s: float) -> GenerationResult:
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
