"""The fields of a Hugging Face request.

Owns the wire models of that family. Bounds that depend on the base are checked elsewhere.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from serve_app.api.http.schemas import MAX_NAME_LENGTH, Int, LoraEntries, Name, PipelineParameters, RequestModel, Seed


class TargetSize(RequestModel):
    """The output's size in pixels, for image-to-image."""

    width: Int
    height: Int


class Parameters(PipelineParameters):
    """How to draw; a field that is absent or null takes the base's default."""

    prompt: str | None = Field(default=None, description="the prompt, where `inputs` is a picture")
    negative_prompt: str | None = Field(default=None, description="what the picture should not show")
    height: Int | None = Field(default=None, description="pixels, a multiple of 8")
    width: Int | None = Field(default=None, description="pixels, a multiple of 8")
    num_inference_steps: Int | None = Field(default=None, description="denoising steps")
    guidance_scale: float | None = Field(default=None, description="how closely to follow the prompt")
    scheduler: Name | None = Field(default=None, description="a noise scheduler that the base offers")
    seed: Seed | None = Field(default=None, description="the same seed draws the same image")
    num_images_per_prompt: Int | None = Field(default=None, description="1: for more, POST /v1/images/generations")
    strength: float | None = Field(default=None, description="image-to-image: over 0 (keep it) to 1 (ignore it)")
    target_size: TargetSize | None = Field(default=None, description="image-to-image: size of the output")
    lora_adapter: str | None = Field(
        default=None,
        max_length=MAX_NAME_LENGTH,
        description="one adapter's id; the `lora` header wins over it",
    )
    loras: LoraEntries | None = Field(default=None, description="several adapters: ids, or objects with id and scale")


class InferenceBody(RequestModel):
    """A request of the Hugging Face shape."""

    inputs: str | None = Field(default=None, description="the prompt; or a picture in base64 for image-to-image")
    image: str | None = Field(default=None, description="a picture in base64: image-to-image")
    parameters: Parameters | None = None
    options: dict[str, Any] | None = Field(default=None, description="accepted, and changes nothing")
