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
)

from tests import tiny

BUILDERS: dict[str, Any] = {}


def fam(build: Any) -> Any:
    """Enter a builder under its name."""
    BUILDERS[build.__name__] = build
    return build


def _sd15(kind: Any, scheduler: Any = None, **unet: Any) -> Any:
    """Return an SD1.5 as another class of pipeline, with another UNet and perhaps another scheduler."""
    parts = {**tiny._sd15().components, "unet": tiny.sd15_unet(**unet)}
    parts.pop("image_encoder")
    return kind(**parts | ({"scheduler": scheduler} if scheduler else {}), requires_safety_checker=False)


@fam
def sd15() -> Any:
    return tiny._sd15()


@fam
def sd21() -> Any:
    scheduler = DDIMScheduler(
        clip_sample=False, set_alpha_to_one=False, prediction_type="v_prediction", **tiny.DIFFUSION_STEPS
    )
    return _sd15(StableDiffusionPipeline, scheduler, attention_head_dim=[4, 8], use_linear_projection=True)


@fam
def sd15_inpaint() -> Any:
    return _sd15(StableDiffusionInpaintPipeline, in_channels=9)


@fam
def instruct_pix2pix() -> Any:
    return _sd15(StableDiffusionInstructPix2PixPipeline, in_channels=8)


@fam
def lcm() -> Any:
    scheduler = LCMScheduler(clip_sample=False, set_alpha_to_one=False, **tiny.DIFFUSION_STEPS)
    return _sd15(LatentConsistencyModelPipeline, scheduler, time_cond_proj_dim=32)


@fam
def sdxl() -> Any:
    return tiny._sdxl()


def _sdxl(kind: Any, parts: dict[str, Any], **unet: Any) -> Any:
    whole = tiny._sdxl()
    kept = {name: getattr(whole, name) for name in kind._get_signature_keys(kind)[0] if hasattr(whole, name)}
    return kind(**{**kept, "unet": tiny.sdxl_unet(**unet), **parts})


@fam
def sdxl_inpaint() -> Any:
    return _sdxl(StableDiffusionXLInpaintPipeline, {}, in_channels=9)


@fam
def sdxl_refiner() -> Any:
    return _sdxl(
        StableDiffusionXLImg2ImgPipeline,
        {
            "text_encoder": None,
            "tokenizer": None,
            "requires_aesthetics_score": True,
            "force_zeros_for_empty_prompt": False,
        },
        projection_class_embeddings_input_dim=5 * 8 + 32,
        cross_attention_dim=32,
    )


@fam
def sdxl_vpred() -> Any:  # NoobAI-XL v-pred style
    p = tiny._sdxl()
    p.scheduler = EulerDiscreteScheduler(
        timestep_spacing="leading", prediction_type="v_prediction", rescale_betas_zero_snr=True, **tiny.DIFFUSION_STEPS
    )
    return p
