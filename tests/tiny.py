"""Tiny pipelines of the oldest families, with random weights, made on the spot in a second or two; no downloads.

`tiny_pipeline("sdxl")` gives a fresh one at each call; the first call of a family builds it, later ones copy it.
"""

from __future__ import annotations

import functools
import json
import logging
import string
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from tests.copies import Original

FAMILIES = ("sd15", "sdxl", "sd3", "flux")
WORDS = ("the", "a", "cat", "dog", "photo", "of", "painting", "red", "pixel", "art", "in", "style")
DIFFUSION_STEPS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}

logging.getLogger("diffusers").setLevel(logging.ERROR)
logging.getLogger("transformers").setLevel(logging.ERROR)


def tiny_pipeline(family: str, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """Return a fresh pipeline: the same weights at every call, no parameter that needs a gradient."""
    return _original(family, dtype).copy()


@functools.cache
def tiny_folder(family: str) -> Path:
    """Return a folder with the pipeline as `save_pretrained` writes it; one per process, removed at its end."""
    folder = Path(_scratch().name) / family
    _master(family).save_pretrained(folder)
    return folder


def denoiser_name(pipeline: DiffusionPipeline) -> str:
    """Return "unet" or "transformer"."""
    return "unet" if hasattr(pipeline, "unet") else "transformer"


def latents(
    pipeline: DiffusionPipeline, *, prompt: str = "a photo of a cat", seed: int = 0, steps: int = 2, **arguments: Any
) -> torch.Tensor:
    """Return what a short 64-pixel run gives before decoding."""
    generator = torch.Generator().manual_seed(seed)
    if not hasattr(pipeline, "unet"):
        arguments.setdefault("max_sequence_length", 32)
    arguments = {"height": 64, "width": 64, "output_type": "latent", **arguments}
    return pipeline(prompt, num_inference_steps=steps, generator=generator, **arguments).images


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="loraplex-tiny-")


@functools.cache
def _original(family: str, dtype: torch.dtype) -> Original:
    pipeline = _master(family) if dtype == torch.float32 else tiny_pipeline(family).to(dtype)
    pipeline.set_progress_bar_config(disable=True)
    return Original(pipeline)


@functools.cache
def _master(family: str) -> DiffusionPipeline:
    with torch.random.fork_rng():
        torch.manual_seed(FAMILIES.index(family))
        pipeline = {"sd15": _sd15, "sdxl": _sdxl, "sd3": _sd3, "flux": _flux}[family]()
        denoiser = getattr(pipeline, denoiser_name(pipeline))
        with torch.no_grad():
            for parameter in denoiser.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(1.5)  # a livelier untrained net
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False)
    return pipeline


def sd15_unet(**changes: Any) -> UNet2DConditionModel:
    config = {
        "sample_size": 16,
        "layers_per_block": 1,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**{**config, **changes})


def sdxl_unet(**changes: Any) -> UNet2DConditionModel:
    config = {
        "sample_size": 16,
        "layers_per_block": 2,
        "block_out_channels": (32, 64, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (4, 8, 8),
        "transformer_layers_per_block": (1, 1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 32,
        "cross_attention_dim": 64,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**{**config, **changes})


def _sd15() -> DiffusionPipeline:
    return StableDiffusionPipeline(
        unet=sd15_unet(),
        vae=_vae(),
        text_encoder=_clip(CLIPTextModel),
        tokenizer=_clip_tokenizer(),
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, **DIFFUSION_STEPS),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl() -> DiffusionPipeline:
    return StableDiffusionXLPipeline(
        unet=sdxl_unet(),
        vae=_vae(),
        text_encoder=_clip(CLIPTextModel),
        text_encoder_2=_clip(CLIPTextModelWithProjection),
        tokenizer=_clip_tokenizer(),
        tokenizer_2=_clip_tokenizer(),
        scheduler=EulerDiscreteScheduler(timestep_spacing="leading", **DIFFUSION_STEPS),
    )


def _flux() -> DiffusionPipeline:
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    tokenizer, text_encoder = _t5(width=32)
    return FluxPipeline(
        transformer=transformer,
        vae=_vae(is_flow=True),
        text_encoder=_clip(CLIPTextModel),
        text_encoder_2=text_encoder,
        tokenizer=_clip_tokenizer(),
        tokenizer_2=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )


def _sd3() -> DiffusionPipeline:
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        pos_embed_max_size=32,
    )
    tokenizer, text_encoder = _t5(width=64)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        vae=_vae(is_flow=True),
        text_encoder=_clip(CLIPTextModelWithProjection),
        text_encoder_2=_clip(CLIPTextModelWithProjection),
        text_encoder_3=text_encoder,
        tokenizer=_clip_tokenizer(),
        tokenizer_2=_clip_tokenizer(),
        tokenizer_3=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def _vae(*, is_flow: bool = False) -> AutoencoderKL:
    flow = {
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "shift_factor": 0.0609,
        "scaling_factor": 1.5035,
    }
    return AutoencoderKL(
        block_out_channels=(16, 32, 32, 32),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=128,
        **(flow if is_flow else {}),
    )


def _clip(
    kind: type[CLIPTextModel | CLIPTextModelWithProjection],
) -> CLIPTextModel | CLIPTextModelWithProjection:
    size = len(_clip_tokenizer())
    config = CLIPTextConfig(
        vocab_size=size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=32,
        bos_token_id=size - 2,
        eos_token_id=size - 1,
        pad_token_id=size - 1,
    )
    return kind(config).eval()


@functools.cache
def _clip_tokenizer() -> CLIPTokenizer:
    """Write a CLIP vocabulary from scratch: 256 bytes, the same ending a word, the merges of a few words, two marks."""
    folder = Path(_scratch().name) / "clip-tokenizer"
    folder.mkdir()
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        symbols = [*word[:-1], word[-1] + "</w>"]
        while len(symbols) > 1:
            merges.append((symbols[0], symbols[1]))
            symbols = [symbols[0] + symbols[1], *symbols[2:]]
    merges = list(dict.fromkeys(merges))
    letters = _byte_letters()
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(left + right for left, right in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    marks = {
        "bos_token": tokens[-2],
        "eos_token": tokens[-1],
        "unk_token": tokens[-1],
        "pad_token": tokens[-1],
    }
    settings = {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer", **marks}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return CLIPTokenizer.from_pretrained(folder)


def _byte_letters() -> list[str]:
    """Return a printable letter for each byte, in the order of CLIP's and GPT-2's vocabularies."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + place) for place in range(len(others))]


def _t5(*, width: int) -> tuple[T5Tokenizer, T5EncoderModel]:
    letters = string.ascii_letters + string.digits + ".,!?-'\""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    pieces += [(letter, -4.0) for letter in letters] + [("\u2581" + word, -3.0) for word in WORDS if len(word) > 1]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0, additional_special_tokens=None, model_max_length=64)
    config = T5Config(
        vocab_size=len(pieces),
        d_model=width,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    return tokenizer, T5EncoderModel(config).eval()
