"""Tiny pipelines of the families whose prompts a language model reads."""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers
from diffusers import (
    AutoencoderDC,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    Kandinsky5T2IPipeline,
    Kandinsky5Transformer3DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus

from tests.tiny_families.parts import (
    CHAT,
    CLIPT,
    clip,
    cliptok,
    gemma2,
    gemma_tokenizer,
    qwen3,
    qwen3_vl_config,
    qwen25vl,
    qwen_tokenizer,
    qwen_vae,
    t5,
    vae,
)

BUILDERS: dict[str, Any] = {}


def fam(build: Any) -> Any:
    """Enter a builder under its name."""
    BUILDERS[build.__name__] = build
    return build


def qwen_tr():
    return QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        guidance_embeds=False,
        axes_dims_rope=(8, 4, 4),
    )


QSCHED = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "shift": 1.0,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
}


@fam
def qwen_image() -> Any:
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**QSCHED),
        vae=qwen_vae(),
        text_encoder=qwen25vl(),
        tokenizer=qwen_tokenizer(),
        transformer=qwen_tr(),
    )


def qwen_processor():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    vp = transformers.Qwen2VLVideoProcessor(min_pixels=28 * 28, max_pixels=56 * 56)
    return transformers.Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=56 * 56),
        tokenizer=qwen_tokenizer(),
        video_processor=vp,
        chat_template=CHAT,
    )


def _with_small_pictures(module: Any) -> None:
    """Have an edit read its pictures at a 16th of their pixels: a megapixel takes a CPU ten seconds."""
    whole = module.calculate_dimensions
    if not hasattr(whole, "__wrapped__"):
        module.calculate_dimensions = functools.wraps(whole)(lambda area, ratio: whole(area // 16, ratio))


@fam
def qwen_image_edit() -> Any:
    _with_small_pictures(pipeline_qwenimage_edit)
    return QwenImageEditPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**QSCHED),
        vae=qwen_vae(),
        text_encoder=qwen25vl(),
        tokenizer=qwen_tokenizer(),
        processor=qwen_processor(),
        transformer=qwen_tr(),
    )


@fam
def qwen_image_edit_plus() -> Any:
    _with_small_pictures(pipeline_qwenimage_edit_plus)
    return QwenImageEditPlusPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**QSCHED),
        vae=qwen_vae(),
        text_encoder=qwen25vl(),
        tokenizer=qwen_tokenizer(),
        processor=qwen_processor(),
        transformer=qwen_tr(),
    )


@fam
def z_image() -> Any:
    tr = ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        norm_eps=1e-5,
        qk_norm=True,
        cap_feat_dim=16,
        rope_theta=256.0,
        t_scale=1000.0,
        axes_dims=[8, 4, 4],
        axes_lens=[1024, 64, 64],
    )
    with torch.no_grad():
        tr.x_pad_token.fill_(1.0)
        tr.cap_pad_token.fill_(1.0)
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(),
        text_encoder=qwen3(transformers.Qwen3Model),
        tokenizer=qwen_tokenizer(),
        transformer=tr,
    )


def dc_vae():
    return AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock",) * 5 + ("EfficientViTBlock",),
        decoder_block_types=("ResBlock",) * 5 + ("EfficientViTBlock",),
        encoder_block_out_channels=(8,) * 6,
        decoder_block_out_channels=(8,) * 6,
        encoder_qkv_multiscales=((),) * 5 + ((5,),),
        decoder_qkv_multiscales=((),) * 5 + ((5,),),
        encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=[1] * 6,
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )


@fam
def sana() -> Any:
    tr = SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=32,
    )
    return SanaPipeline(
        tokenizer=gemma_tokenizer(),
        text_encoder=gemma2(),
        vae=dc_vae(),
        transformer=tr,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


@fam
def sana_sprint() -> Any:
    tr = SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=32,
        qk_norm="rms_norm_across_heads",
        guidance_embeds=True,
    )
    return SanaSprintPipeline(
        tokenizer=gemma_tokenizer(), text_encoder=gemma2(), vae=dc_vae(), transformer=tr, scheduler=SCMScheduler()
    )


@fam
def kandinsky5() -> Any:
    tr = Kandinsky5Transformer3DModel(
        in_visual_dim=16,
        in_text_dim=32,
        in_text_dim2=32,
        time_dim=16,
        out_visual_dim=16,
        patch_size=(1, 2, 2),
        model_dim=16,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(1, 1, 2),
        visual_cond=False,
        attention_type="regular",
    )
    return Kandinsky5T2IPipeline(
        transformer=tr,
        vae=vae(16),
        text_encoder=qwen25vl(32, (2, 2, 4)),
        tokenizer=qwen_processor(),
        text_encoder_2=clip(CLIPT),
        tokenizer_2=cliptok(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )


@fam
def krea2() -> Any:
    tr = Krea2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        timestep_embed_dim=8,
        text_hidden_dim=16,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
        rope_theta=1000.0,
    )
    return Krea2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=6400
        ),
        vae=qwen_vae(),
        text_encoder=transformers.Qwen3VLModel(qwen3_vl_config()).eval(),
        tokenizer=qwen_tokenizer(),
        transformer=tr,
        text_encoder_select_layers=(0, 1, 2),
    )


@fam
def wan_t2v() -> Any:
    tok, te = t5(32)
    v = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    tr = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=256,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    return WanPipeline(
        transformer=tr,
        vae=v,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        text_encoder=te,
        tokenizer=tok,
    )
