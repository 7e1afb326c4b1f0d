"""A replica whose steps are naps: everything of production but the denoising, which costs no CPU.

Each image is of one colour, which tells its seed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ray import serve

from serve_app.config import BaseModelConfig, Environment, SharedSettings
from serve_app.core import GenerationRequest, PixelImage
from serve_app.deployments.replica.replica import BaseModelReplica
from serve_app.engine.drawing.pipeline import PassOutcome
from tests.replicas.wrapped import HOLD, WrappedPipeline

IMAGE_STEP_S = 0.05


def colour_of(seed: int) -> tuple[int, int, int]:
    return seed % 256, seed // 256 % 256, 77


class Stepping(WrappedPipeline):
    """A base's pipeline, of which `generate` alone is another: it sleeps for each step of each image."""

    def __init__(self, pipeline: Any, hold: Path) -> None:
        super().__init__(pipeline)
        self._hold = hold

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        *,
        on_step: Callable[[int, int], None],
        is_cancelled: Callable[[], bool],
        between_steps: Callable[[], None],
        **_: Any,
    ) -> PassOutcome:
        from serve_app.engine.drawing.steps import GenerationCancelled

        steps, images = requests[0].planned_steps, sum(request.num_images for request in requests)
        for step in range(1, steps + 1):
            while self._hold.exists():
                time.sleep(0.02)
            time.sleep(images * IMAGE_STEP_S)
            if is_cancelled():
                raise GenerationCancelled
            on_step(step, steps)
            if step < steps:
                between_steps()
        return PassOutcome(
            images=tuple(tuple(_image(request, index) for index in range(request.num_images)) for request in requests),
            warnings=((),) * len(requests),
            denoise_ms=steps * images * IMAGE_STEP_S * 1e3,
            decode_ms=0.0,
        )


@serve.deployment
class SteppingReplica(BaseModelReplica.func_or_class):
    """`BaseModelReplica` on a device that naps by steps."""

    async def __init__(self, base: BaseModelConfig, shared: SharedSettings, environment: Environment) -> None:
        await super().__init__(base, shared, environment)
        self._worker._pipeline = Stepping(self._worker._pipeline, environment.cache_dir / HOLD)

    async def told(self) -> tuple[int, int]:
        """Return this process's number and the steps that it has made."""
        return os.getpid(), self._worker.snapshot().steps


def _image(request: GenerationRequest, index: int) -> PixelImage:
    pixels = bytes(colour_of(request.seed + index)) * (request.width * request.height)
    return PixelImage(request.width, request.height, pixels)
