"""Adapter files for the tiny pipelines, in the forms that trainers write, with random tensors.

`lora()` gives peft keys for a pipeline's component; `as_kohya()` respells them; `write()` makes the file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.tiny import denoiser_name

Chooses = Callable[[str, nn.Module], bool]
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")


def attention(name: str, module: nn.Module) -> bool:
    """Choose the denoiser's ordinary targets."""
    return name.endswith(ATTENTION)


def text_layers(name: str, module: nn.Module) -> bool:
    """Choose a text encoder's attention and MLP."""
    return name.endswith((*TEXT_ATTENTION, "fc1", "fc2"))


def linear(name: str, module: nn.Module) -> bool:
    """Choose every linear layer."""
    return isinstance(module, nn.Linear)


def everything(name: str, module: nn.Module) -> bool:
    """Choose every linear layer and convolution."""
    return isinstance(module, nn.Linear | nn.Conv2d)


def layers_of(pipeline: DiffusionPipeline, component: str, chooses: Chooses) -> dict[str, nn.Module]:
    """Return the linear layers and convolutions of a component that `chooses` picks."""
    modules = getattr(pipeline, component).named_modules()
    return {name: module for name, module in modules if everything(name, module) and chooses(name, module)}


def lora(
    pipeline: DiffusionPipeline,
    component: str | None = None,
    *,
    rank: int | Callable[[str], int] = 4,
    chooses: Chooses = attention,
    seed: int = 0,
    dtype: torch.dtype = torch.float16,
    strength: float = 0.05,
    bias: bool = False,
    dora: bool = False,
) -> dict[str, Tensor]:
    """Return peft keys -> random factors over the chosen layers."""
    component = component or denoiser_name(pipeline)
    random = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, module in layers_of(pipeline, component, chooses).items():
        weight = module.weight
        width = rank(name) if callable(rank) else rank
        tail = weight.shape[2:]
        down = torch.randn(width, *weight.shape[1:], generator=random)
        up = torch.randn(weight.shape[0], width, *[1] * len(tail), generator=random)
        stem = f"{component}.{name}"
        tensors[f"{stem}.lora_A.weight"] = (down * down[0].numel() ** -0.5).to(dtype)
        tensors[f"{stem}.lora_B.weight"] = (up * strength).to(dtype)
        if bias:
            tensors[f"{stem}.lora_B.bias"] = (torch.randn(weight.shape[0], generator=random) * strength).to(dtype)
        if dora:
            norm = weight.flatten(1).float().norm(dim=1)
            wobble = 1 + 0.1 * torch.randn(norm.shape, generator=random)
            magnitude = (norm * wobble).to(dtype)
            tensors[f"{stem}.lora_magnitude_vector"] = magnitude[None, :, None, None] if tail else magnitude
    return tensors


def as_kohya(
    tensors: Mapping[str, Tensor],
    *,
    alpha: float | Callable[[str], float] | None = None,
    text_prefixes: tuple[str, str] = ("lora_te1_", "lora_te2_"),
) -> dict[str, Tensor]:
    """Respell peft keys as kohya's; `alpha` of a dotted module name, or one for all."""
    prefixes = {"unet": "lora_unet_", "transformer": "lora_transformer_"}
    prefixes |= {"text_encoder": text_prefixes[0], "text_encoder_2": text_prefixes[1]}
    parts = {
        "lora_A.weight": "lora_down.weight",
        "lora_B.weight": "lora_up.weight",
        "magnitude": "dora_scale",
    }
    respelt: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        component, _, rest = key.partition(".")
        module, _, part = rest.partition(".lora_")
        if component.startswith("text_encoder") and not module.startswith(("text_model", "text_projection")):
            module = "text_model." + module
        stem = prefixes[component] + module.replace(".", "_")
        if part.startswith("magnitude"):
            respelt[f"{stem}.dora_scale"] = tensor.flatten()[:, None]
            continue
        respelt[f"{stem}.{parts['lora_' + part]}"] = tensor
        if part == "A.weight" and alpha is not None:
            respelt[f"{stem}.alpha"] = torch.tensor(float(alpha(module) if callable(alpha) else alpha))
    return respelt


def loha(
    pipeline: DiffusionPipeline, *, rank: int = 4, chooses: Chooses = attention, seed: int = 0
) -> dict[str, Tensor]:
    """Return a LyCORIS LoHa over the chosen layers of the denoiser."""
    random = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, module in layers_of(pipeline, denoiser_name(pipeline), chooses).items():
        stem = "lora_unet_" + name.replace(".", "_")
        out, inputs = module.weight.shape[0], module.weight[0].numel()
        for number in (1, 2):
            tensors[f"{stem}.hada_w{number}_a"] = torch.randn(out, rank, generator=random).half() * 0.1
            tensors[f"{stem}.hada_w{number}_b"] = torch.randn(rank, inputs, generator=random).half() * 0.1
        tensors[f"{stem}.alpha"] = torch.tensor(rank / 2)
    return tensors


def lokr(
    pipeline: DiffusionPipeline, *, rank: int | None = None, chooses: Chooses = attention, seed: int = 0
) -> dict[str, Tensor]:
    """Return a LyCORIS LoKr with left factors of 4 x 4; with `rank`, the right ones are stored decomposed."""
    random = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, module in layers_of(pipeline, denoiser_name(pipeline), chooses).items():
        stem = "lora_unet_" + name.replace(".", "_")
        out, inputs, tail = module.weight.shape[0] // 4, module.weight.shape[1] // 4, module.weight.shape[2:]
        tensors[f"{stem}.lokr_w1"] = torch.randn(4, 4, generator=random).half() * 0.1
        if rank is None:
            tensors[f"{stem}.lokr_w2"] = torch.randn(out, inputs, *tail, generator=random).half() * 0.1
        else:
            flat = inputs * tail.numel()
            tensors[f"{stem}.lokr_w2_a"] = torch.randn(out, rank, generator=random).half() * 0.1
            tensors[f"{stem}.lokr_w2_b"] = torch.randn(rank, flat, generator=random).half() * 0.1
        tensors[f"{stem}.alpha"] = torch.tensor(2.0)
    return tensors


def full(
    pipeline: DiffusionPipeline, *, chooses: Chooses = attention, seed: int = 0, bias: bool = True
) -> dict[str, Tensor]:
    """Return LyCORIS's full differences over the chosen layers of the denoiser."""
    random = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, module in layers_of(pipeline, denoiser_name(pipeline), chooses).items():
        stem = "lycoris_" + name.replace(".", "_")
        tensors[f"{stem}.diff"] = torch.randn(module.weight.shape, generator=random).half() * 0.02
        if bias and module.bias is not None:
            tensors[f"{stem}.diff_b"] = torch.randn(module.bias.shape, generator=random).half() * 0.02
    return tensors


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> Path:
    """Write a safetensors file; `metadata` becomes diffusers' `lora_adapter_metadata`."""
    header = {"format": "pt"}
    if metadata is not None:
        header["lora_adapter_metadata"] = json.dumps(metadata)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata=header)
    return path
