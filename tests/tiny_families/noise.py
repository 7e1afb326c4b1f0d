"""Tiny pipelines of the families that predict noise: Stable Diffusion in all its forms."""

from __future__ import annotations

from typing import Any

from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    UNet2DConditionModel,
)

from tests import tiny

BUILDERS: dict[str, Any] = {}


def fam(build: Any) -> Any:
    """Enter a builder under its name."""
    BUILDERS[build.__name__] = build
    return build


@fam
def sd15() -> Any:
    return tiny._sd15()


@fam
def sd21() -> Any:
    p = tiny._sd15()
    unet = UNet2DConditionModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=[4, 8],
        norm_num_groups=8,
        use_linear_projection=True,
    )
    sch = DDIMScheduler(
        clip_sample=False, set_alpha_to_one=False, prediction_type="v_prediction", **tiny.DIFFUSION_STEPS
    )
    return StableDiffusionPipeline(
        unet=unet,
        vae=p.vae,
        text_encoder=p.text_encoder,
        tokenizer=p.tokenizer,
        scheduler=sch,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@fam
def sd15_inpaint() -> Any:
    p = tiny._sd15()
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=9,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    return StableDiffusionInpaintPipeline(
        unet=unet,
        vae=p.vae,
        text_encoder=p.text_encoder,
        tokenizer=p.tokenizer,
        scheduler=p.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@fam
def instruct_pix2pix() -> Any:
    p = tiny._sd15()
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=8,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    return StableDiffusionInstructPix2PixPipeline(
        unet=unet,
        vae=p.vae,
        text_encoder=p.text_encoder,
        tokenizer=p.tokenizer,
        scheduler=p.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@fam
def lcm() -> Any:
    p = tiny._sd15()
    unet = UNet2DConditionModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
        time_cond_proj_dim=32,
    )
    return LatentConsistencyModelPipeline(
        unet=unet,
        vae=p.vae,
        text_encoder=p.text_encoder,
        tokenizer=p.tokenizer,
        scheduler=LCMScheduler(clip_sample=False, set_alpha_to_one=False, **tiny.DIFFUSION_STEPS),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@fam
def sdxl() -> Any:
    return tiny._sdxl()


def _xl_unet(**kw):
    a = {
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
    a.update(kw)
    return UNet2DConditionModel(**a)


@fam
def sdxl_inpaint() -> Any:
    p = tiny._sdxl()
    return StableDiffusionXLInpaintPipeline(
        unet=_xl_unet(in_channels=9),
        vae=p.vae,
        text_encoder=p.text_encoder,
        text_encoder_2=p.text_encoder_2,
        tokenizer=p.tokenizer,
        tokenizer_2=p.tokenizer_2,
        scheduler=p.scheduler,
    )


@fam
def sdxl_refiner() -> Any:
    p = tiny._sdxl()
    unet = _xl_unet(projection_class_embeddings_input_dim=5 * 8 + 32, cross_attention_dim=32)
    return StableDiffusionXLImg2ImgPipeline(
        unet=unet,
        vae=p.vae,
        text_encoder=None,
        text_encoder_2=p.text_encoder_2,
        tokenizer=None,
        tokenizer_2=p.tokenizer_2,
        scheduler=p.scheduler,
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
    )


@fam
def sdxl_vpred() -> Any:  # NoobAI-XL v-pred style
    p = tiny._sdxl()
    p.scheduler = EulerDiscreteScheduler(
        timestep_spacing="leading", prediction_type="v_prediction", rescale_betas_zero_snr=True, **tiny.DIFFUSION_STEPS
    )
    return p
