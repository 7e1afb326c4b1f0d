"""Embeddings files for the tiny pipelines, as pivotal tuning writes them, and diffusers' own way of applying them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# What each family's trainers call its text encoders.
NAMES = {
    "sd15": {"clip_l": "text_encoder"},
    "sdxl": {"clip_l": "text_encoder", "clip_g": "text_encoder_2"},
    "flux": {"clip_l": "text_encoder", "t5": "text_encoder_2"},
}


def embeddings(
    family: str, *, ti_tokens: int = 2, seed: int = 0, dtype: torch.dtype = torch.float16
) -> dict[str, Tensor]:
    """Return random words for every text encoder of a family, large enough to show in an image."""
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(ti_tokens, 32, generator=random).to(dtype) * 3 for name in NAMES[family]}


def numbered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Respell the keys by the text encoders' place in the pipeline."""
    return {f"text_encoders_{place}": tensor for place, tensor in enumerate(tensors.values())}


def taught_by_diffusers(pipeline: Any, family: str, tensors: Mapping[str, Tensor]) -> Any:
    """Load the words with diffusers and return the pipeline."""
    for name, tensor in tensors.items():
        component = NAMES[family][name]
        tokenizer = component.replace("text_encoder", "tokenizer")
        setattr(pipeline, tokenizer, copy.deepcopy(getattr(pipeline, tokenizer)))  # tiny pipelines share one
        pipeline.load_textual_inversion(
            tensor if len(tensor) > 1 else tensor[0],
            token=[f"<s{place}>" for place in range(len(tensor))],
            text_encoder=getattr(pipeline, component),
            tokenizer=getattr(pipeline, tokenizer),
        )
        getattr(pipeline, component).requires_grad_(False)  # a new embedding wants gradients, which changes kernels
    return pipeline
