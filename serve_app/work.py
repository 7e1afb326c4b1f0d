"""The work of a request in units, and a model of how long units take; used by routing, queues and autoscaling.

Must not know where a request runs, Ray or torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from serve_app.core import GenerationRequest

# The weight of the newest pass in the moving average.
NEWEST_WEIGHT = 0.2
# A pass counts as at most so many times the pace known before: one that takes longer tells of a machine that stood
# still. A replica that believed it would get no more work, and never learn better.
MOST_GROWTH = 4.0


@dataclass(frozen=True, slots=True)
class LatencyModel:
    """The time of a pass: `fixed_s` seconds, and `unit_s` seconds for each unit of work."""

    fixed_s: float
    unit_s: float

    def seconds(self, units: float) -> float:
        """Return the predicted seconds of a pass."""
        return self.fixed_s + self.unit_s * units


def work_units(request: GenerationRequest) -> float:
    """Return the work of a request in megapixel-steps: images x steps x runs of the denoiser in a step x pixels."""
    steps = max(request.planned_steps, 1)
    runs = request.denoiser_runs or usual_runs(request.guidance_scale)
    return request.num_images * image_units(steps, runs, request.width, request.height)


def usual_runs(guidance_scale: float) -> int:
    """Return how often the denoiser of most families runs in a step: once more, unguided, where the scale is over 1."""
    return 2 if guidance_scale > 1 else 1


def image_units(steps: int, denoiser_runs: int, width: int, height: int) -> float:
    """Return the work of one image drawn from a prompt."""
    return steps * denoiser_runs * width * height / 1e6


class LatencyEstimator:
    """Estimates the latency model of one replica from its passes.

    Starts with a guess, then uses the mean of the first passes, then a moving average, because the first pass is often
    slow (caches, memory, choice of kernels). No pass counts as more than `MOST_GROWTH` times that. Not thread-safe.
    """

    def __init__(self, guess: LatencyModel) -> None:
        self.pace = guess
        self._observed = 0

    def observe(self, *, units: float, denoise_s: float, other_s: float) -> None:
        """Add one pass: its work in units, the time that grows with it, and the rest.

        Passes without work, or with times that are not finite, are ignored.
        """
        if units <= 0 or not math.isfinite(denoise_s) or not math.isfinite(other_s):
            return
        took = LatencyModel(max(other_s, 0.0), max(denoise_s, 0.0) / units)
        if self._observed and (growth := took.seconds(units) / max(self.pace.seconds(units), 1e-9)) > MOST_GROWTH:
            took = LatencyModel(took.fixed_s * MOST_GROWTH / growth, took.unit_s * MOST_GROWTH / growth)
        self._observed += 1
        weight = max(NEWEST_WEIGHT, 1 / self._observed)
        self.pace = LatencyModel(
            fixed_s=(1 - weight) * self.pace.fixed_s + weight * took.fixed_s,
            unit_s=(1 - weight) * self.pace.unit_s + weight * took.unit_s,
        )
