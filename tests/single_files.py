"""Checkpoints as one file, under the names that the first implementations gave to weights: the inverse of diffusers'.

UNets and FLUX transformers go by the table that adapters are read by; VAEs and text encoders are spelt out here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from serve_app.families.original_names import rows_of, unet_name

_VAE_BLOCKS = (
    (r"mid_block\.resnets\.0\.", "mid.block_1."),
    (r"mid_block\.resnets\.1\.", "mid.block_2."),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
)
_OPEN_CLIP = (
    (r"encoder\.layers", "transformer.resblocks"),
    (r"layer_norm(\d)", r"ln_\1"),
    (r"mlp\.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.c_proj"),
    (r"self_attn", "attn"),
    (r"embeddings\.token_embedding", "token_embedding"),
    (r"embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"final_layer_norm", "ln_final"),
)

_FLUX = ("double_blocks", "single_blocks", "img_in", "txt_in", "time_in", "vector_in", "guidance_in", "final_layer")


def write_single_file(path: Path, pipeline: Any, **marks: Tensor) -> Path:
    """Write a Stable Diffusion pipeline, 1.5 or XL, as one checkpoint; `marks` are further keys."""
    tensors = original_unet(pipeline.unet) | original_vae(pipeline.vae)
    if hasattr(pipeline, "text_encoder_2"):
        tensors |= _clip(pipeline.text_encoder, "conditioner.embedders.0.transformer.")
        tensors |= _open_clip(pipeline.text_encoder_2, "conditioner.embedders.1.model.")
    else:
        tensors |= _clip(pipeline.text_encoder, "cond_stage_model.transformer.")
    save_file({name: tensor.contiguous() for name, tensor in (tensors | marks).items()}, path)
    return path


def original_unet(unet: Any) -> dict[str, Tensor]:
    """Return the weights of a UNet under their original names."""
    with_attention = [number for number, block in enumerate(unet.up_blocks) if hasattr(block, "attentions")]
    named: dict[str, Tensor] = {}
    for key, tensor in unet.state_dict().items():
        module, _, end = key.rpartition(".")
        name = unet_name(module, unet.config.layers_per_block, with_attention)
        assert name is not None, key
        named[f"model.diffusion_model.{name}.{end}"] = tensor
    return named


def original_vae(vae: Any, prefix: str = "first_stage_model.") -> dict[str, Tensor]:
    """Return the weights of a VAE under their original names; the attention's are convolutions there."""
    blocks = len(vae.config.up_block_types)
    named: dict[str, Tensor] = {}
    for key, tensor in vae.state_dict().items():
        name = re.sub(r"up_blocks\.(\d)", lambda match: f"up.{blocks - 1 - int(match[1])}", key)
        name = name.replace(".resnets.", ".block.") if name.startswith("decoder.up.") else name
        name = name.replace("upsamplers.0", "upsample")
        for pattern, replacement in _VAE_BLOCKS:
            name = re.sub(pattern, replacement, name)
        is_projection = ".mid.attn_1." in name and tensor.ndim == 2
        named[prefix + name] = tensor[:, :, None, None] if is_projection else tensor
    return named


def original_flux(transformer: Any) -> dict[str, Tensor]:
    """Return the weights of a FLUX transformer under their original names."""
    weights = transformer.state_dict()
    modules = {key.rpartition(".")[0] for key in weights}
    named: dict[str, Tensor] = {}
    for row in rows_of(modules):
        if not row.name.startswith(_FLUX) or ".processor." in row.name:
            continue
        for end in ("weight", "bias"):
            parts = [weights[f"{module}.{end}"] for module in row.modules if f"{module}.{end}" in weights]
            if not parts:
                continue
            whole = torch.cat(parts)
            whole = torch.cat(whole.chunk(2)[::-1]) if row.swaps_halves else whole
            named[row.name if row.name.endswith(".scale") else f"{row.name}.{end}"] = whole
    return named


def _clip(encoder: Any, prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}text_model.{_bare(key)}": tensor for key, tensor in encoder.state_dict().items()}


def _open_clip(encoder: Any, prefix: str) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    weights = {_bare(key): tensor for key, tensor in encoder.state_dict().items()}
    named[f"{prefix}text_projection"] = weights.pop("text_projection.weight").T
    for key, tensor in weights.items():
        if re.search(r"\.[kv]_proj\.", key):
            continue
        if ".q_proj." in key:
            tensor = torch.cat([weights[key.replace(".q_proj.", f".{one}_proj.")] for one in "qkv"])
            key = key.replace(".q_proj.", ".in_proj_")
        for pattern, replacement in _OPEN_CLIP:
            key = re.sub(pattern, replacement, key)
        named[prefix + key] = tensor
    return named


def _bare(key: str) -> str:
    return key.removeprefix("text_model.")
