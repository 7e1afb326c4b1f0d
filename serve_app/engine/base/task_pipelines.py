"""What a base can draw from: text, a picture, a picture and a mask.

Owns the pipelines of one base, which share every module, and which of them a request takes. Must not know how a
request becomes the arguments of a call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any

from diffusers.pipelines.auto_pipeline import AutoPipelineForImage2Image, AutoPipelineForInpainting

from serve_app.core import GenerationRequest
from serve_app.errors import MalformedRequest


@dataclass(frozen=True, slots=True)
class TaskPipelines:
    """The pipelines over one set of modules; None where the family has no such pipeline."""

    text_to_image: Any
    image_to_image: Any | None
    inpainting: Any | None

    def of(self, request: GenerationRequest) -> Any:
        """Return the pipeline that a request takes.

        Raises:
            MalformedRequest: the family has none.
        """
        if request.image is None:
            return self.text_to_image
        if request.mask is not None:
            if self.inpainting is None:
                raise MalformedRequest(f"{request.base_id} cannot draw a part of a picture anew; leave out the mask")
            return self.inpainting
        if self.image_to_image is None:
            raise MalformedRequest(f"{request.base_id} makes images from text only")
        return self.image_to_image


def variants_of(pipeline: Any) -> TaskPipelines:
    """Return the pipelines over the modules of a text-to-image pipeline."""
    variants = TaskPipelines(
        text_to_image=pipeline,
        image_to_image=_over(pipeline, AutoPipelineForImage2Image.from_pipe),
        inpainting=_over(pipeline, AutoPipelineForInpainting.from_pipe),
    )
    for variant in filter(None, (variants.text_to_image, variants.image_to_image, variants.inpainting)):
        # An invisible watermark is drawn only where an optional package happens to be installed.
        if hasattr(variant, "watermark"):
            variant.watermark = None
    return variants


def takes_size(pipeline: Any) -> bool:
    """Say whether a pipeline needs telling the size; others take the picture's."""
    return "width" in signature(type(pipeline).__call__).parameters


def _over(pipeline: Any, from_pipe: Callable[[Any], Any]) -> Any | None:
    try:
        variant: Any = from_pipe(pipeline)
    except ValueError:
        return None
    variant.set_progress_bar_config(disable=True)
    return variant
