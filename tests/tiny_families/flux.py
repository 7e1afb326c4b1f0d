"""Tiny pipelines of FLUX.1 and FLUX.2 in all their forms."""

from __future__ import annotations

from typing import Any

import transformers
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxFillPipeline,
    FluxKontextPipeline,
    FluxTransformer2DModel,
)

from tests import tiny
from tests.tiny_families.parts import (
    CHAT,
    qwen_tokenizer,
    vocab,
)

BUILDERS: dict[str, Any] = {}


def fam(build: Any) -> Any:
    """Enter a builder under its name."""
    BUILDERS[build.__name__] = build
    return build


def _flux():
    p = tiny._flux()
    p.tokenizer_2.model_max_length = 512
    p.tokenizer_2.init_kwargs["model_max_length"] = 512
    return p


@fam
def flux_dev() -> Any:
    return _flux()


@fam
def flux_schnell() -> Any:
    p = _flux()
    tr = FluxTransformer2DModel.from_config({**p.transformer.config, "guidance_embeds": False})
    p.register_modules(transformer=tr, scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0))
    return p


@fam
def flux_kontext() -> Any:
    p = _flux()
    return FluxKontextPipeline(
        scheduler=p.scheduler,
        vae=p.vae,
        text_encoder=p.text_encoder,
        tokenizer=p.tokenizer,
        text_encoder_2=p.text_encoder_2,
        tokenizer_2=p.tokenizer_2,
        transformer=p.transformer,
    )


@fam
def flux_fill() -> Any:
    p = _flux()
    # in = 16 latent + 16 masked + 4*(8*8) mask
    tr = FluxTransformer2DModel.from_config(
        {
            **{k: v for k, v in p.transformer.config.items() if k != "_use_default_values"},
            "in_channels": 16 + 16 + 4 * 64,
            "out_channels": 16,
        }
    )
    return FluxFillPipeline(
        scheduler=p.scheduler,
        vae=p.vae,
        text_encoder=p.text_encoder,
        tokenizer=p.tokenizer,
        text_encoder_2=p.text_encoder_2,
        tokenizer_2=p.tokenizer_2,
        transformer=tr,
    )


def flux2_vae():
    return AutoencoderKLFlux2(
        sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


@fam
def flux2_klein() -> Any:
    tr = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        timestep_guidance_channels=256,
        axes_dims_rope=[4, 4, 4, 4],
        guidance_embeds=False,
    )
    te = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=28,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            vocab_size=vocab(),
            max_position_embeddings=2048,
        )
    ).eval()
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=flux2_vae(),
        text_encoder=te,
        tokenizer=qwen_tokenizer(),
        transformer=tr,
        is_distilled=False,
    )


@fam
def flux2() -> Any:
    tr = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        timestep_guidance_channels=256,
        axes_dims_rope=[4, 4, 4, 4],
    )
    toks = [
        *tiny._byte_letters(),
        "<unk>",
        "<s>",
        "</s>",
        "<pad>",
        "[INST]",
        "[/INST]",
        "[IMG]",
        "[IMG_BREAK]",
        "[IMG_END]",
        "[SYSTEM_PROMPT]",
        "[/SYSTEM_PROMPT]",
    ]
    bpe = transformers.Qwen2Tokenizer(
        vocab={t: i for i, t in enumerate(toks)},
        merges=[],
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=toks[260:],
        model_max_length=4096,
    )
    from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

    proc = transformers.PixtralProcessor(
        image_processor=PixtralImageProcessorPil(),
        tokenizer=bpe,
        patch_size=6,
        chat_template=CHAT.replace("<|im_start|>", "[INST]").replace("<|im_end|>", "[/INST]"),
    )
    cfg = transformers.Mistral3Config(
        text_config={
            "model_type": "mistral",
            "vocab_size": len(toks) + 4,
            "hidden_size": 16,
            "intermediate_size": 37,
            "max_position_embeddings": 2048,
            "num_attention_heads": 4,
            "num_hidden_layers": 31,
            "num_key_value_heads": 2,
            "sliding_window": None,
        },
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "intermediate_size": 37,
            "image_size": 30,
            "patch_size": 6,
            "num_channels": 3,
        },
        image_token_index=262,
    )
    return Flux2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=flux2_vae(),
        text_encoder=transformers.Mistral3ForConditionalGeneration(cfg).eval(),
        tokenizer=proc,
        transformer=tr,
    )
