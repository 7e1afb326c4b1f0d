"""A stand-in for a base's replica: its requests take as long as they say, one after the other, and cost no CPU."""

from __future__ import annotations

import asyncio
import time

from ray import serve

from serve_app.autoscaling.policy import replica_report
from serve_app.core import AdapterSpec, GenerationRequest, GenerationResult, ScaledAdapter, Timings
from serve_app.engine.worker.pace import LoadTracker
from serve_app.work import LatencyModel, work_units

UNIT_S = 0.05
BASE = "sleep/base"


def sleeping_request(number: int, *adapters: ScaledAdapter) -> GenerationRequest:
    """Return a request of a quarter of a second: five units of work."""
    return GenerationRequest(
        request_id=f"request-{number}", base_id=BASE, prompt="", negative_prompt=None, adapters=adapters,
        width=1000, height=1000, steps=5, guidance_scale=1.0, scheduler=None, seed=number,
    )  # fmt: skip


def sleeping_use(name: str) -> ScaledAdapter:
    """Return a resolved adapter as a request carries it."""
    return ScaledAdapter(
        AdapterSpec(name, BASE, "0123456789abcdef", "weights.safetensors", "folder", "nowhere", 1), 1.0
    )


@serve.deployment
class Sleeper:
    """Sleeps `UNIT_S` for each unit of work, and before that for its start; reports itself as a real replica does."""

    async def __init__(self, start_s: float = 0.1) -> None:
        self._start_s = start_s
        await asyncio.sleep(start_s)
        self._books = LoadTracker(LatencyModel(fixed_s=0.0, unit_s=UNIT_S), typical_units=5.0)
        self._waiting: list[float] = []
        self._device = asyncio.Lock()

    async def generate(self, request: GenerationRequest) -> GenerationResult:
        """Take as long as the request's work."""
        units = work_units(request)
        self._books.arrived(units, time.monotonic())
        self._waiting.append(units)
        async with self._device:
            self._waiting.remove(units)
            self._books.begun(units, time.monotonic())
            await asyncio.sleep(units * UNIT_S)
            self._books.ended(time.monotonic(), denoise_s=units * UNIT_S)
        return GenerationResult(
            request_id=request.request_id, base_id=request.base_id, images=(), seeds=(request.seed,), adapters=(),
            timings=Timings(), compute_s=units * UNIT_S, device="sleep", batch_size=1,
        )  # fmt: skip

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Report as a replica does."""
        work = self._books.snapshot(self._waiting, time.monotonic())
        return replica_report(
            backlog_s=work.backlog_s,
            request_s=work.request_s,
            load=work.load,
            requests=len(self._waiting) + self._device.locked(),
            start_s=self._start_s,
        )
