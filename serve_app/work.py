"""How much work a request is, and how long that takes: the one measure that routing, queues and scaling share.

Owns the unit of work and the pace that is measured against it. Must not know where a request runs, Ray or torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from serve_app.core import GenerationRequest

# How fast the measured pace follows what is observed: the weight of the newest pass, once there are some.
NEWEST_WEIGHT = 0.2


@dataclass(frozen=True, slots=True)
class LatencyModel:
    """How fast a replica works: `fixed_s` for each pass, and `unit_s` for each unit of work in it, both in seconds."""

    fixed_s: float
    unit_s: float

    def seconds(self, units: float) -> float:
        """Return how long a pass of so much work is expected to take."""
        return self.fixed_s + self.unit_s * units


def work_units(request: GenerationRequest) -> float:
    """Return the work of a request in megapixel-steps: images x steps x pixels, twice where guidance needs two."""
    steps = max(request.planned_steps, 1)
    return request.num_images * image_units(steps, request.guidance_scale, request.width, request.height)


def image_units(steps: int, guidance_scale: float, width: int, height: int) -> float:
    """Return the work of one image drawn from a prompt."""
    # Pipelines of diffusers run the denoiser once more for the unguided half when the scale is over 1.
    evaluations = 2.0 if guidance_scale > 1 else 1.0
    return steps * evaluations * width * height / 1e6


class LatencyEstimator:
    """The pace of one replica, from what its passes took.

    Starts at a guess; after that it is the mean of the first passes, and then follows the newest. A first pass is often
    slow (caches, memory, kernels that are chosen once) and should not be believed for long. Not thread-safe.
    """

    def __init__(self, guess: LatencyModel) -> None:
        self.pace = guess
        self._observed = 0

    def observe(self, *, units: float, denoise_s: float, other_s: float) -> None:
        """Take in one pass: its work in units, the time that grows with it, and the time that does not.

        Passes without work, or with times that are no numbers, say nothing and are left out.
        """
        if units <= 0 or not math.isfinite(denoise_s) or not math.isfinite(other_s):
            return
        self._observed += 1
        weight = max(NEWEST_WEIGHT, 1 / self._observed)
        self.pace = LatencyModel(
            fixed_s=(1 - weight) * self.pace.fixed_s + weight * max(other_s, 0.0),
            unit_s=(1 - weight) * self.pace.unit_s + weight * max(denoise_s, 0.0) / units,
        )
