"""The architectures: the classes of Stable Diffusion 1.5 and XL at a thousandth of the size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from serve_app.demo.embedded import SIDE_PX

TextEncoder = CLIPTextModel | CLIPTextModelWithProjection

TIME_ID_WIDTH = 16  # SDXL: width of the embedding of each of its six size and crop numbers

_DOWN, _CROSS_DOWN = "DownBlock2D", "CrossAttnDownBlock2D"
_UP, _CROSS_UP = "UpBlock2D", "CrossAttnUpBlock2D"
_SD15_UNET: dict[str, Any] = {
    "down_block_types": (_CROSS_DOWN, _CROSS_DOWN, _DOWN),
    "up_block_types": (_UP, _CROSS_UP, _CROSS_UP),
    "cross_attention_dim": 64,
    "attention_head_dim": 4,
}
_SDXL_UNET: dict[str, Any] = {
    "down_block_types": (_DOWN, _CROSS_DOWN, _CROSS_DOWN),
    "up_block_types": (_CROSS_UP, _CROSS_UP, _UP),
    "cross_attention_dim": 48 + 64,
    "attention_head_dim": (2, 4, 4),
    "transformer_layers_per_block": 1,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": TIME_ID_WIDTH,
    "projection_class_embeddings_input_dim": 6 * TIME_ID_WIDTH + 64,
}


def make_autoencoder() -> AutoencoderKL:
    """An autoencoder whose latents are eight times smaller than the picture, with 4 channels."""
    channels = (16, 32, 64, 64)
    shape: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(channels),
        "block_out_channels": channels,
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": SIDE_PX,
        "force_upcast": False,
    }
    return AutoencoderKL(**shape)


def make_scheduler() -> DDIMScheduler:
    """The noise schedule that the bases are trained with and saved with."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
        timestep_spacing="trailing",
    )


def make_text_encoders(family: str, tokenizer: CLIPTokenizer) -> list[TextEncoder]:
    """One text encoder for SD1.5, two for SDXL, the second of them projected."""
    if family == "sd15":
        return [CLIPTextModel(_text_config(tokenizer, 64, 2))]
    first = CLIPTextModel(_text_config(tokenizer, 48, 3))
    return [first, CLIPTextModelWithProjection(_text_config(tokenizer, 64, 3))]


def _text_config(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextConfig:
    special: dict[str, Any] = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        **special,
    )


def make_unet(family: str) -> UNet2DConditionModel:
    """Three levels, 8x8 to 2x2 latents: the lowest sees the whole picture at once, which shapes need."""
    shape = {
        "sample_size": SIDE_PX // 8,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "block_out_channels": (48, 64, 80),
    }
    return UNet2DConditionModel(**shape, **(_SD15_UNET if family == "sd15" else _SDXL_UNET))


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Token ids of shape (n, 77), as the pipelines make them."""
    length = tokenizer.model_max_length
    encoded = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return encoded.input_ids


@torch.no_grad()
def encode_texts(
    encoders: list[TextEncoder], tokenizer: CLIPTokenizer, texts: list[str]
) -> tuple[Tensor, Tensor | None]:
    """The outputs of the pipeline's `encode_prompt` for the UNet: the sequence, and for SDXL the pooled vector."""
    ids = tokenize(tokenizer, texts)
    if len(encoders) == 1:
        return encoders[0](ids)[0], None
    outputs = [encoder(ids, output_hidden_states=True) for encoder in encoders]
    return torch.cat([output.hidden_states[-2] for output in outputs], -1), outputs[1][0]


def assemble(
    family: str,
    autoencoder: AutoencoderKL,
    encoders: list[TextEncoder],
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
) -> DiffusionPipeline:
    """The pipeline of this family from its parts."""
    parts: dict[str, Any] = {
        "vae": autoencoder,
        "text_encoder": encoders[0],
        "tokenizer": tokenizer,
        "unet": unet,
        "scheduler": make_scheduler(),
    }
    if family == "sd15":
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        return StableDiffusionPipeline(**parts)
    parts |= {"text_encoder_2": encoders[1], "tokenizer_2": tokenizer, "force_zeros_for_empty_prompt": True}
    return StableDiffusionXLPipeline(**parts)
