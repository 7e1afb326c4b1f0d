"""Tiny pipelines of the families that came last."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from diffusers import (
    AutoencoderKLWan,
    BriaFibo2Pipeline,
    BriaFibo2Transformer2DModel,
    BriaFiboEditPipeline,
    BriaFiboPipeline,
    BriaFiboTransformer2DModel,
    ErnieImagePipeline,
    ErnieImageTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinKVPipeline,
    Ideogram4Pipeline,
    Ideogram4Transformer2DModel,
    Kandinsky5I2IPipeline,
    ZImageOmniPipeline,
    ZImageTransformer2DModel,
)

from tests.tiny_families.flux import flux2_klein, flux2_vae
from tests.tiny_families.language import kandinsky5, qwen_processor, z_image
from tests.tiny_families.parts import qwen3_vl_config, qwen_tokenizer, vocab

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
    return Ideogram4Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=flux2_vae(),
        text_encoder=transformers.Qwen3VLModel(qwen3_vl_config(layers=36)).eval(),
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


@fam
def bria_fibo() -> Any:
    text_encoder = transformers.SmolLM3ForCausalLM(
        transformers.SmolLM3Config(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=128_001,  # the last stands for an empty prompt
            pad_token_id=0,
        )
    ).eval()
    return BriaFiboPipeline(
        transformer=BriaFiboTransformer2DModel(
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=[0, 4, 4],
            text_encoder_dim=16,
        ),
        vae=AutoencoderKLWan(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
            is_residual=True,
            in_channels=12,
            out_channels=12,
            patch_size=2,
            scale_factor_spatial=16,
        ),
        text_encoder=text_encoder,
        tokenizer=qwen_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )


@fam
def bria_fibo_edit() -> Any:
    return BriaFiboEditPipeline(**bria_fibo().components)


def _qwen3_vl_processor() -> Any:
    parts = qwen_processor()
    return transformers.Qwen3VLProcessor(
        image_processor=type(parts.image_processor)(patch_size=16, min_pixels=32 * 32, max_pixels=64 * 64),
        tokenizer=parts.tokenizer,
        video_processor=transformers.Qwen3VLVideoProcessor(),
        chat_template=parts.chat_template,
    )


@fam
def bria_fibo2() -> Any:
    pipeline = BriaFibo2Pipeline(
        transformer=BriaFibo2Transformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            cap_feat_dim=48,
            injection_layer_ids=(0, 1),
            perceiver_num_layers=1,
            min_num_gist_tokens=4,
            max_num_gist_tokens=8,
            gist_step=4,
            gist_min_text_len=8,
            gist_max_text_len=16,
            axes_dims=(8, 4, 4),
            axes_lens=(1024, 64, 64),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=flux2_vae(),
        text_encoder=transformers.Qwen3VLForConditionalGeneration(qwen3_vl_config(layers=36)).eval(),
        processor=_qwen3_vl_processor(),
    )
    pipeline.default_sample_size = 16  # each of several pictures is read at this size: a megapixel takes a CPU seconds
    return pipeline


@fam
def z_image_omni() -> Any:
    parts = z_image().components
    # As published bases have it: the pipeline gives its VAE pictures in this dtype alone.
    vae = parts["vae"].to(torch.bfloat16)
    siglip = transformers.Siglip2VisionModel(
        transformers.Siglip2VisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_patches=16,
            patch_size=16,
        )
    ).eval()  # fmt: skip
    known = {name: value for name, value in parts["transformer"].config.items() if name[0] != "_"}
    transformer = ZImageTransformer2DModel.from_config({**known, "siglip_feat_dim": 16})
    with torch.no_grad():  # these begin uninitialised
        for token in (transformer.x_pad_token, transformer.cap_pad_token, transformer.siglip_pad_token):
            token.fill_(1.0)
    from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

    processor = Siglip2ImageProcessorPil(patch_size=16, max_num_patches=16)
    return ZImageOmniPipeline(
        **{**parts, "vae": vae, "transformer": transformer}, siglip=siglip, siglip_processor=processor
    )
