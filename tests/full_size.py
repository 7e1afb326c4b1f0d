"""SDXL at the size that it is published in, with random weights: seven gigabytes in bfloat16."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from serve_app.bench.measuring.options import Model
from serve_app.bench.models.architectures import ARCHITECTURES
from tests.tiny import tiny_pipeline

_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
}
_NOISE = 1 << 20


def full_size_sdxl(folder: Path) -> tuple[Path, Any]:
    """Write the configuration and the tokenizers, without weights; return their folder and the pipeline."""
    tiny: Any = tiny_pipeline("sdxl")
    with torch.device("meta"):
        parts: dict[str, Any] = {
            "unet": UNet2DConditionModel(**ARCHITECTURES[Model.SDXL].configuration(is_narrow=False)),
            "vae": AutoencoderKL(**_VAE),
            "text_encoder": CLIPTextModel(_clip(768, 12, 12, "quick_gelu")),
            "text_encoder_2": CLIPTextModelWithProjection(_clip(1280, 32, 20, "gelu")),
        }
    for name, part in parts.items():
        (folder / name).mkdir(parents=True)
        text = part.config.to_json_string() if name.startswith("text") else part.to_json_string()
        (folder / name / "config.json").write_text(text)
        _fill(part.to(torch.bfloat16).to_empty(device="cpu"))
    rest = {"tokenizer": tiny.tokenizer, "tokenizer_2": tiny.tokenizer_2, "scheduler": EulerDiscreteScheduler()}
    for name, part in rest.items():
        part.save_pretrained(folder / name)
    (folder / "model_index.json").write_text(json.dumps(tiny.config | {"_class_name": "StableDiffusionXLPipeline"}))
    return folder, StableDiffusionXLPipeline(**parts, **rest)


def _clip(width: int, layers: int, heads: int, activation: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=width,
        hidden_act=activation,
    )


def _fill(module: torch.nn.Module) -> None:
    """Draw weights; one drawing serves all, since billions would take minutes."""
    noise = torch.randn(_NOISE, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(torch.bfloat16)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(float(name.endswith("weight")))
                continue
            for piece in parameter.view(-1).split(_NOISE):
                piece.copy_(noise[: len(piece)])
