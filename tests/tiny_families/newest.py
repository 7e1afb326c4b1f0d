"""Tiny pipelines of the families that came last."""

from __future__ import annotations

from typing import Any

import transformers
from diffusers import (
    ErnieImagePipeline,
    ErnieImageTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinKVPipeline,
    Ideogram4Pipeline,
    Ideogram4Transformer2DModel,
    Kandinsky5I2IPipeline,
)

from tests.tiny_families.flux import flux2_klein, flux2_vae
from tests.tiny_families.language import kandinsky5
from tests.tiny_families.parts import qwen_ids, qwen_tokenizer, vocab

BUILDERS: dict[str, Any] = {}


def fam(build: Any) -> Any:
    """Enter a builder under its name."""
    BUILDERS[build.__name__] = build
    return build


@fam
def ernie() -> Any:
    text_encoder = transformers.Mistral3Model(
        transformers.Mistral3Config(
            text_config={
                "model_type": "mistral",
                "vocab_size": vocab(),
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_attention_heads": 2,
                "num_hidden_layers": 2,
                "num_key_value_heads": 2,
            },
            vision_config={
                "model_type": "pixtral",
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 16,
                "image_size": 30,
                "patch_size": 6,
            },
        )
    ).eval()
    return ErnieImagePipeline(
        transformer=ErnieImageTransformer2DModel(
            hidden_size=32,
            num_attention_heads=2,
            num_layers=2,
            ffn_hidden_size=32,
            in_channels=16,
            out_channels=16,
            text_in_dim=16,
            rope_axes_dim=(4, 6, 6),
        ),
        vae=flux2_vae(),
        text_encoder=text_encoder,
        tokenizer=qwen_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def _ideogram_transformer() -> Any:
    return Ideogram4Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        intermediate_size=32,
        adaln_dim=8,
        llm_features_dim=13 * 16,  # 13 layers of the text encoder are read
        mrope_section=(4, 2, 2),
    )


@fam
def ideogram4() -> Any:
    config = transformers.Qwen3VLConfig(
        text_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 36,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "vocab_size": vocab(),
        },
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16},
        **qwen_ids(),
    )
    return Ideogram4Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=flux2_vae(),
        text_encoder=transformers.Qwen3VLModel(config).eval(),
        tokenizer=qwen_tokenizer(),
        transformer=_ideogram_transformer(),
        unconditional_transformer=_ideogram_transformer(),
    )


@fam
def flux2_klein_kv() -> Any:
    return Flux2KleinKVPipeline(**flux2_klein().components, is_distilled=True)


@fam
def kandinsky5_edit() -> Any:
    parts = kandinsky5().components
    # It reads the picture beside the latents, and where there is one.
    transformer = type(parts["transformer"]).from_config({**parts["transformer"].config, "visual_cond": True})
    return Kandinsky5I2IPipeline(**{**parts, "transformer": transformer})
