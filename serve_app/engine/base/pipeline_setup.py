"""How a loaded pipeline is set up: memory format, and how its VAE takes large pictures and several at once.

Owns the choices; `loraplex bench pipeline` measures each, and docs/benchmarks.md says what was found. Attention is
torch's own scaled dot product, which diffusers takes by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from serve_app.config import BaseModelConfig
from serve_app.engine.base.manifest import adaptable_components

# Up to this many times the side that it was trained for, a VAE decodes a picture whole.
TILES = 2


def configure_pipeline(pipeline: Any, config: BaseModelConfig) -> None:
    """Set up a pipeline that is on its device; to be called once, before anything else looks at its weights."""
    is_on_gpu = pipeline.device.type == "cuda"
    if config.memory_format == "channels_last" or (config.memory_format == "auto" and is_on_gpu):
        set_memory_format(pipeline, torch.channels_last)
    decode_one_by_one(pipeline.vae)
    if config.vae_tiling == "always" or (config.vae_tiling == "auto" and is_on_gpu):
        decode_by_tiles(pipeline.vae, TILES if config.vae_tiling == "auto" else 1)


def set_memory_format(pipeline: Any, memory_format: torch.memory_format) -> None:
    """Lay out the weights of the convolutions of denoiser and VAE; values follow them.

    A part with three-dimensional convolutions, such as a video model's VAE, has no such layout and stays as it is.
    """
    # Untyped: torch's stubs lack this form of `to`.
    denoiser: Any = next(iter(adaptable_components(pipeline).values()))
    for module in (denoiser, pipeline.vae):
        if all(parameter.ndim <= 4 for parameter in module.parameters()):
            module.to(memory_format=memory_format)


def decode_one_by_one(vae: Any) -> None:
    """Have the images of a pass decoded one after another: each as it would be alone, in the memory of one."""
    if hasattr(vae, "use_slicing"):
        vae.use_slicing = True


def decode_by_tiles(vae: Any, times: int) -> None:
    """Have images with a side over `times` the trained one decoded in overlapping tiles of that size."""
    if hasattr(vae, "use_tiling") and hasattr(vae, "tile_latent_min_size"):
        vae.use_tiling = True
        vae.tile_sample_min_size *= times
        vae.tile_latent_min_size *= times


def compile_denoiser(pipeline: DiffusionPipeline, *, backend: str | Callable[..., Any] = "inductor") -> None:
    """Have torch compile the denoiser at its first call, and once more for each new kind of input.

    In place: a wrapper would rename every parameter. Swaps give parameters other memory with the same shape, stride
    and dtype, which the compiled code reads at each call, so it must not capture addresses: no CUDA graphs.
    """
    denoiser: Any = next(iter(adaptable_components(pipeline).values()))
    denoiser.compile(backend=backend)
