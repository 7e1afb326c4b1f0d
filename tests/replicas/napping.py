"""A replica whose passes over the device are naps: everything of production but the denoising, which costs no CPU.

On a small machine the processors that draw are the ones that refuse; on a GPU's node they are not. A device that naps
keeps the two apart, so that what is measured under overload is the service.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from ray import serve

from serve_app.config import BaseModelConfig, Environment, SharedSettings
from serve_app.core import GenerationRequest, PixelImage
from serve_app.deployments.replica.replica import BaseModelReplica
from serve_app.engine.drawing.pipeline import PassOutcome
from tests.replicas.wrapped import WrappedPipeline

IMAGE_S = 1 / 15


class Napping(WrappedPipeline):
    """A base's pipeline, of which `generate` alone is another: it sleeps for a while for each image."""

    def generate(self, requests: Sequence[GenerationRequest], **_: Any) -> PassOutcome:
        count = sum(request.num_images for request in requests)
        time.sleep(count * IMAGE_S)
        return PassOutcome(
            images=tuple((_grey(request),) * request.num_images for request in requests),
            warnings=((),) * len(requests),
            denoise_ms=count * IMAGE_S * 1e3,
            decode_ms=0.0,
        )


@serve.deployment
class NappingReplica(BaseModelReplica.func_or_class):
    """`BaseModelReplica` on a device that naps."""

    async def __init__(self, base: BaseModelConfig, shared: SharedSettings, environment: Environment) -> None:
        await super().__init__(base, shared, environment)
        self._worker._pipeline = Napping(self._worker._pipeline)


def _grey(request: GenerationRequest) -> PixelImage:
    return PixelImage(request.width, request.height, bytes([128]) * (3 * request.width * request.height))
