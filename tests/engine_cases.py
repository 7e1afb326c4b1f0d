"""Requests, bases and adapters for the engine's tests, on the tiny pipelines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy
import torch
from PIL import Image

from serve_app.config import BaseModelConfig
from serve_app.core import AdapterSpec, GenerationRequest, PixelImage, Progress, ScaledAdapter
from serve_app.engine.adapters.deltas import Coverage, LowRank, ParsedAdapter
from serve_app.engine.base.fetching import ResolvedSource
from serve_app.engine.base.loading import LoadedBase
from serve_app.engine.base.manifest import BaseManifest
from serve_app.engine.drawing.pipeline import BasePipeline
from serve_app.engine.worker.job import OnEvent
from serve_app.settings import ModelSource
from tests.tiny import tiny_folder

BASE = "tiny/base"
_REQUEST = GenerationRequest(
    request_id="request-1",
    base_id=BASE,
    prompt="a photo of a cat",
    negative_prompt=None,
    adapters=(),
    width=64,
    height=64,
    steps=3,
    guidance_scale=4.0,
    scheduler=None,
    seed=7,
)


def request(**changes: Any) -> GenerationRequest:
    """Return a request for a small text-to-image picture, but for what is said."""
    return replace(_REQUEST, **changes)


def base_config(family: str, **changes: Any) -> BaseModelConfig:
    """Return the configuration of a tiny base."""
    return BaseModelConfig(id=BASE, source=ModelSource(folder=tiny_folder(family)), **changes)


def load(family: str, **changes: Any) -> BasePipeline:
    """Load a tiny base from its folder, as a replica does."""
    device = torch.device("cpu")
    return BasePipeline.load(base_config(family, **changes), ResolvedSource(folder=tiny_folder(family)), device=device)


def wrap(live: Any, family: str = "sd15", **changes: Any) -> BasePipeline:
    """Return a base over a pipeline that the test holds too."""
    return BasePipeline(base_config(family, **changes), LoadedBase(live))


def photo(width: int = 64, height: int = 64) -> PixelImage:
    """Return a picture with a gradient in each channel."""
    rows, columns = numpy.mgrid[0:height, 0:width]
    channels = (columns * 255 // width, rows * 255 // height, (rows + columns) % 256)
    return PixelImage(width, height, numpy.stack(channels, axis=2).astype("uint8").tobytes())


def picture(image: PixelImage) -> Image.Image:
    """Return the pixels as a picture."""
    return Image.frombytes("RGB", (image.width, image.height), image.pixels)


def largest_difference(first: PixelImage, second: PixelImage) -> int:
    """Return by how many 8-bit levels two images differ where they differ most."""
    left, right = (numpy.frombuffer(image.pixels, "uint8").astype(int) for image in (first, second))
    return int(abs(left - right).max())


def one_image(pipeline: BasePipeline, wanted: GenerationRequest) -> PixelImage:
    """Run one request alone and return its one image."""
    (images,) = pipeline.generate([wanted]).images
    assert isinstance(images, tuple)
    (image,) = images
    return image


def parsed_adapter(manifest: BaseManifest, *, seed: int = 0, strength: float = 0.2) -> ParsedAdapter:
    """Return an adapter over the denoiser's attention, drawn from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    layers: dict[str, LowRank] = {}
    for name, layer in manifest.components[manifest.denoiser].items():
        if name.endswith(("to_q", "to_v", "to_out.0")):
            outputs, inputs = layer.shape
            down = torch.randn(4, inputs, generator=generator) * inputs**-0.5
            up = torch.randn(outputs, 4, generator=generator) * strength
            layers[name] = LowRank(down, up, alpha=4.0, divisor=4.0)
    coverage = Coverage(layers_matched=len(layers), layers_in_file=len(layers) + 1)
    return ParsedAdapter(f"digest-{seed}", {manifest.denoiser: layers}, coverage)


def use_of(name: str, scale: float = 1.0) -> ScaledAdapter:
    """Return a resolved adapter as a request carries it."""
    spec = AdapterSpec(
        id=name,
        base_id=BASE,
        revision="0123456789abcdef",
        filename="pytorch_lora_weights.safetensors",
        origin="folder",
        location="nowhere",
        size_bytes=1,
    )
    return ScaledAdapter(spec, scale)


def on_steps(listener: Callable[[int, int], object]) -> OnEvent:
    """Return a listener to a job's events that hears (steps done, steps in all) alone."""

    def hear(event: Any) -> None:
        if isinstance(event, Progress) and event.step:
            listener(event.step, event.steps)

    return hear
