"""The work between two steps of denoising: progress and previews out, cancellation and suspension in."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from serve_app.engine.drawing.pixels import are_finite
from serve_app.engine.drawing.preview import Previewer

OnStep = Callable[[int, int], None]
# Called where a pass may be suspended; returns when it is to go on.
BetweenSteps = Callable[[], None]


class GenerationCancelled(Exception):
    """No caller waits for the pass any more; it stopped between two steps."""


class StepCallback:
    """The `callback_on_step_end` of one pipeline call.

    After the last step, `denoised_at` is the time on `time.perf_counter` and `is_finite` says of each image
    whether its latents are sound, [n] bool. `paused_s` is how long `between_steps` took altogether.
    """

    denoised_at: float
    is_finite: torch.Tensor

    def __init__(
        self,
        on_step: OnStep | None,
        is_cancelled: Callable[[], bool] | None,
        previewer: Previewer | None = None,
        between_steps: BetweenSteps | None = None,
    ) -> None:
        self._on_step = on_step
        self._is_cancelled = is_cancelled
        self._previewer = previewer
        self._between_steps = between_steps
        self.paused_s = 0.0

    def __call__(self, pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """Take note of one step.

        Raises:
            GenerationCancelled: the pass is no longer wanted.
        """
        if self._is_cancelled is not None and self._is_cancelled():
            raise GenerationCancelled
        # Not every pipeline keeps the number.
        steps: int = getattr(pipeline, "num_timesteps", None) or len(pipeline.scheduler.timesteps)
        if step + 1 == steps:
            # Asking for the value waits for the device, so that the time is that of the work and not of its
            # launch.
            self.is_finite = are_finite(tensors["latents"]).cpu()
            self.denoised_at = time.perf_counter()
        if self._on_step is not None:
            self._on_step(step + 1, steps)
        if self._previewer is not None:
            self._previewer.after(step + 1, steps)
        if self._between_steps is not None and step + 1 < steps:
            paused_at = time.perf_counter()
            self._between_steps()
            self.paused_s += time.perf_counter() - paused_at
        return tensors
