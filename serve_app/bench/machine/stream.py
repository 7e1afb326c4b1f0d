"""Denoiser steps as requests would run them, to see what a swap costs a stream of images.

Owns the inputs: random ones, in the shapes that each family's pipeline gives.
"""

from __future__ import annotations

from typing import Any

import torch

from serve_app.bench.measuring.options import Device, SwapOptions
from serve_app.bench.models.denoisers import Denoiser

CPU_STEPS, CPU_LATENT = 4, 8
GPU_STEPS = 25


class ImageSteps:
    """The denoiser steps of one image; guidance runs a UNet on a batch of two, and FLUX on one."""

    def __init__(self, denoiser: Denoiser, options: SwapOptions) -> None:
        self._module = denoiser.module
        self._config: Any = denoiser.module.config
        is_unet = denoiser.architecture.component == "unet"
        on_cpu = options.device is Device.CPU
        own_size = self._config.sample_size if is_unet else 128
        self.steps = options.steps or (CPU_STEPS if on_cpu else GPU_STEPS)
        self.latent = options.latent or (CPU_LATENT if on_cpu else own_size)
        self.batch = 2 if is_unet else 1
        self._random = torch.Generator().manual_seed(options.seed)
        self._like = next(denoiser.module.parameters())
        self._inputs = self._unet() if is_unet else self._transformer(denoiser.architecture.sequence)

    def run(self) -> torch.Tensor:
        """Run the steps of one image; returns what the last one gave."""
        with torch.no_grad():
            for _ in range(self.steps):
                (outcome,) = self._module(**self._inputs, return_dict=False)
        return outcome

    def _unet(self) -> dict[str, Any]:
        config = self._config
        inputs: dict[str, Any] = {
            "sample": self._draw(self.batch, config.in_channels, self.latent, self.latent),
            "timestep": torch.tensor(500, device=self._like.device),
            "encoder_hidden_states": self._draw(self.batch, 77, config.cross_attention_dim),
        }
        if config.addition_embed_type == "text_time":
            text_width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            added = {"text_embeds": self._draw(self.batch, text_width), "time_ids": self._draw(self.batch, 6)}
            inputs["added_cond_kwargs"] = added
        return inputs

    def _transformer(self, sequence: int) -> dict[str, Any]:
        config, device = self._config, self._like.device
        patches = (self.latent // 2) ** 2
        return {
            "hidden_states": self._draw(1, patches, config.in_channels),
            "encoder_hidden_states": self._draw(1, sequence, config.joint_attention_dim),
            "pooled_projections": self._draw(1, config.pooled_projection_dim),
            "timestep": self._draw(1).abs(),
            "guidance": torch.ones(1, device=device) if config.guidance_embeds else None,
            "img_ids": torch.zeros(patches, 3, device=device),
            "txt_ids": torch.zeros(sequence, 3, device=device),
        }

    def _draw(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._random).to(self._like.device, self._like.dtype)
