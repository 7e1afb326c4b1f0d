"""The public shapes of the denoisers that are measured, as their authors publish them.

Owns the numbers, each with its source; only what differs from the diffusers class's own defaults is written. A
narrow variant keeps the module tree, and with it every Python call, and makes the layers small.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from serve_app.bench.measuring.options import Model


@dataclass(frozen=True, slots=True)
class Architecture:
    """A denoiser: the diffusers classes, the published configuration, and what makes it narrow.

    `component` is the denoiser's name in its pipeline, `sequence` the length of its prompt's embedding.
    """

    pipeline: str
    denoiser: str
    component: str
    source: str
    config: Mapping[str, Any]
    sequence: int = 77
    narrow: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def configuration(self, *, is_narrow: bool) -> dict[str, Any]:
        """Return the arguments of the denoiser's class."""
        return {**self.config, **self.narrow} if is_narrow else dict(self.config)


_SDXL = {
    "sample_size": 128,
    "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "cross_attention_dim": 2048,
}
_NARROW_SDXL = {
    "sample_size": 16,
    "block_out_channels": (16, 32, 48),
    "attention_head_dim": (2, 4, 6),
    "norm_num_groups": 8,
    "cross_attention_dim": 64,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
}
_TINY = {
    "layers_per_block": 1,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (4, 8),
    "transformer_layers_per_block": (1, 1),
}
_SD15 = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}
_NARROW_SD15 = {
    "sample_size": 16,
    "block_out_channels": (16, 32, 48, 48),
    "norm_num_groups": 8,
    "cross_attention_dim": 64,
}
_FLUX = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
}
_NARROW_FLUX = {
    "in_channels": 16,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 64,
    "axes_dims_rope": (4, 6, 6),
}

ARCHITECTURES: Mapping[Model, Architecture] = {
    Model.TINY: Architecture(
        pipeline="StableDiffusionXLPipeline",
        denoiser="UNet2DConditionModel",
        component="unet",
        source="none: a two-block relative of SDXL, for trying the benchmark itself",
        config={**_SDXL, **_NARROW_SDXL, **_TINY},
    ),
    Model.SD15: Architecture(
        pipeline="StableDiffusionPipeline",
        denoiser="UNet2DConditionModel",
        component="unet",
        source="stable-diffusion-v1-5/stable-diffusion-v1-5, unet/config.json",
        config=_SD15,
        narrow=_NARROW_SD15,
    ),
    Model.SDXL: Architecture(
        pipeline="StableDiffusionXLPipeline",
        denoiser="UNet2DConditionModel",
        component="unet",
        source="stabilityai/stable-diffusion-xl-base-1.0, unet/config.json",
        config=_SDXL,
        narrow=_NARROW_SDXL,
    ),
    Model.FLUX: Architecture(
        pipeline="FluxPipeline",
        denoiser="FluxTransformer2DModel",
        component="transformer",
        source="black-forest-labs/FLUX.1-dev, transformer/config.json",
        config=_FLUX,
        sequence=512,
        narrow=_NARROW_FLUX,
    ),
}
