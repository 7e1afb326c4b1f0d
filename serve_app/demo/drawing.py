"""Pictures from the demo models through plain diffusers, batched, as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor

from serve_app.demo.embedded import GUIDANCE_SCALE, STEPS, embedded_root

_BATCH = 10


def load_base(model: str, root: Path | None = None) -> DiffusionPipeline:
    """Load a base by its public id, without a progress bar."""
    pipeline = DiffusionPipeline.from_pretrained(str((root or embedded_root()) / model))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int = STEPS,
    guidance_scale: float = GUIDANCE_SCALE,
) -> Tensor:
    """One picture a prompt, each from its own seed: float32 of shape (n, 3, h, w) in [0, 1]."""
    generate = cast(Any, pipeline)  # the common class of all pipelines declares no call
    pictures: list[Tensor] = []
    for start in range(0, len(prompts), _BATCH):
        part = slice(start, start + _BATCH)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
        result = generate(
            list(prompts[part]),
            generator=generators,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            output_type="pt",
        )
        pictures.append(result.images)
    return torch.cat(pictures).float().clamp(0, 1)
