"""The table of base families: one row for each pipeline class that a `model_index.json` may name.

Owns the rows, the classes that make videos or sound, and how a base's own configuration changes its row. A new family
of the usual kind is one row here and one tiny pipeline in `tests/tiny_families`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from serve_app.families.defaults import DISTILLED_STEPS, FamilyDefaults
from serve_app.families.family import ALWAYS, NEVER, Family, Task


def _tasks(prefix: str, *, inpaint: bool = True) -> dict[Task, str]:
    """Return the three classes that a family has by diffusers' own way of naming."""
    found: dict[Task, str] = {"text": f"{prefix}Pipeline", "image": f"{prefix}Img2ImgPipeline"}
    return {**found, "inpaint": f"{prefix}InpaintPipeline"} if inpaint else found


# As most services draw these two; diffusers' own 50 steps are slow, and no better.
_SD = FamilyDefaults(30, 7.5, 512, 8)
_XL = FamilyDefaults(30, 5.0, 1024, 8)
_FLUX = Family(
    "FLUX.1",
    side_multiple=16,
    tokens=512,
    latents="packed",
    guided_above=NEVER,
    has_own_true_cfg=True,
    sends_levels=("sigmas",),
    structure="flux",
    defaults=FamilyDefaults(28, 3.5, 1024),
    tasks=_tasks("Flux"),
)
_FLUX_2 = Family(
    "FLUX.2",
    side_multiple=16,
    tokens=512,
    latents="patched",
    structure="flux2",
    defaults=FamilyDefaults(50, 4.0, 1024),
    shares_passes=False,
    sends_levels=("sigmas",),
    takes_references=True,
)
# One step is NaN: the schedule is stretched to end at `shift_terminal`, which one step alone cannot.
_QWEN = Family(
    "Qwen-Image",
    side_multiple=16,
    tokens=512,
    latents="packed",
    guidance=("true_cfg_scale",),
    min_steps=2,
    sends_levels=("sigmas",),
    structure="qwen-image",
    defaults=FamilyDefaults(50, 4.0, 1024),
    tasks=_tasks("QwenImage"),
)
_SD3 = Family(
    "SD3",
    side_multiple=16,
    tokens=256,
    structure="sd3",
    defaults=FamilyDefaults(28, 7.0, 1024, 8),
    tasks=_tasks("StableDiffusion3"),
)
_KANDINSKY = Family(
    "Kandinsky 5",
    side_multiple=16,
    tokens=512,
    latents="channels last",
    defaults=FamilyDefaults(50, 3.5, 1024),
    shares_passes=False,
    needs_torchvision=True,
    area_parameter="resolutions",
)

_FIBO = Family(
    "FIBO",
    side_multiple=16,
    tokens=3000,
    latents="patched",
    shares_passes=False,
    sends_levels=("sigmas",),
    unfit_schedulers=("UniPCMultistepScheduler",),
    structure="fibo",
    defaults=FamilyDefaults(30, 5.0, 1024),
    tasks={"text": "BriaFiboPipeline"},
)
_Z_IMAGE = Family(
    "Z-Image",
    side_multiple=16,
    tokens=512,
    guided_above=0.0,
    sends_levels=("sigmas",),
    unfit_schedulers=("UniPCMultistepScheduler",),
    structure="z-image",
    defaults=FamilyDefaults(50, 5.0, 1024),
    tasks=_tasks("ZImage"),
)

FAMILIES: Mapping[str, Family] = {
    "StableDiffusionPipeline": Family("SD", structure="sd1", defaults=_SD, tasks=_tasks("StableDiffusion")),
    "StableDiffusionInpaintPipeline": Family(
        "SD inpainting", structure="sd1", defaults=_SD, tasks={"inpaint": "StableDiffusionInpaintPipeline"}
    ),
    "StableDiffusionInstructPix2PixPipeline": Family(
        "InstructPix2Pix",
        structure="sd1",
        defaults=_SD,
        tasks={"edit": "StableDiffusionInstructPix2PixPipeline"},
        guided_runs=3,
    ),
    "LatentConsistencyModelPipeline": Family(
        "LCM",
        structure="sd1",
        defaults=FamilyDefaults(4, 8.5, 512, 8),
        tasks=_tasks("LatentConsistencyModel", inpaint=False),
        guided_above=NEVER,
        sends_levels=("original_inference_steps",),
        unfit_schedulers=("TCDScheduler",),
    ),
    "StableDiffusionXLPipeline": Family("SDXL", structure="sdxl", defaults=_XL, tasks=_tasks("StableDiffusionXL")),
    "StableDiffusionXLInpaintPipeline": Family(
        "SDXL inpainting", structure="sdxl", defaults=_XL, tasks={"inpaint": "StableDiffusionXLInpaintPipeline"}
    ),
    "StableDiffusionXLImg2ImgPipeline": Family(
        "SDXL refiner",
        structure="sdxl",
        defaults=_XL,
        tasks={"image": "StableDiffusionXLImg2ImgPipeline", "inpaint": "StableDiffusionXLInpaintPipeline"},
    ),
    "StableDiffusion3Pipeline": _SD3,
    "FluxPipeline": _FLUX,
    "FluxFillPipeline": replace(
        _FLUX,
        name="FLUX.1 Fill",
        defaults=FamilyDefaults(50, 30.0, 1024),
        tasks={"inpaint": "FluxFillPipeline"},
        has_own_true_cfg=False,
    ),
    "FluxKontextPipeline": replace(
        _FLUX,
        name="FLUX.1 Kontext",
        area_parameter="max_area",
        fixed={"_auto_resize": False},
        tasks={"text": "FluxKontextPipeline", "edit": "FluxKontextPipeline", "inpaint": "FluxKontextInpaintPipeline"},
    ),
    "Flux2Pipeline": replace(
        _FLUX_2,
        name="FLUX.2",
        guided_above=NEVER,
        needs_torchvision=True,
        tasks={"text": "Flux2Pipeline", "edit": "Flux2Pipeline"},
    ),
    "Flux2KleinPipeline": replace(
        _FLUX_2,
        name="FLUX.2 klein",
        tasks={"text": "Flux2KleinPipeline", "edit": "Flux2KleinPipeline", "inpaint": "Flux2KleinInpaintPipeline"},
    ),
    "Flux2KleinKVPipeline": replace(
        _FLUX_2,
        name="FLUX.2 klein KV",
        guided_above=NEVER,
        reads_guidance=False,
        defaults=FamilyDefaults(DISTILLED_STEPS, 1.0, 1024),
        tasks={"text": "Flux2KleinKVPipeline", "edit": "Flux2KleinKVPipeline"},
    ),
    # Its inpainting asks the denoiser for a setting that it does not have (diffusers 0.42).
    "ChromaPipeline": Family(
        "Chroma",
        side_multiple=16,
        tokens=512,
        latents="packed",
        sends_levels=("sigmas",),
        structure="chroma",
        defaults=FamilyDefaults(35, 5.0, 1024),
        tasks=_tasks("Chroma", inpaint=False),
    ),
    "QwenImagePipeline": _QWEN,
    # Its inpainting draws a megapixel, regardless of the size asked for (diffusers 0.42).
    "QwenImageEditPipeline": replace(
        _QWEN,
        name="Qwen-Image-Edit",
        shares_passes=False,
        needs_torchvision=True,
        tasks={"edit": "QwenImageEditPipeline"},
    ),
    "QwenImageEditPlusPipeline": replace(
        _QWEN,
        name="Qwen-Image-Edit-Plus",
        shares_passes=False,
        takes_references=True,
        needs_torchvision=True,
        tasks={"edit": "QwenImageEditPlusPipeline"},
    ),
    "ZImagePipeline": _Z_IMAGE,
    "ZImageOmniPipeline": replace(
        _Z_IMAGE,
        name="Z-Image Omni",
        takes_references=True,
        shares_passes=False,
        tasks={"text": "ZImageOmniPipeline", "edit": "ZImageOmniPipeline"},
    ),
    "HiDreamImagePipeline": Family(
        "HiDream",
        side_multiple=16,
        tokens=128,
        area_parameter="default_sample_size",
        sends_levels=("mu",),
        unfit_schedulers=("DEISMultistepScheduler", "DPMSolverMultistepScheduler"),
        defaults=FamilyDefaults(50, 5.0, 1024),
        tasks={"text": "HiDreamImagePipeline"},
    ),
    "Lumina2Pipeline": Family(
        "Lumina 2",
        side_multiple=16,
        tokens=256,
        sends_levels=("sigmas",),
        structure="lumina2",
        defaults=FamilyDefaults(30, 4.0, 1024),
        tasks={"text": "Lumina2Pipeline"},
    ),
    "SanaPipeline": Family(
        "Sana",
        side_multiple=32,
        tokens=300,
        fixed={"use_resolution_binning": False},
        defaults=FamilyDefaults(20, 4.5, 1024, 32),
        tasks={"text": "SanaPipeline"},
    ),
    "SanaSprintPipeline": Family(
        "Sana-Sprint",
        side_multiple=32,
        tokens=300,
        min_steps=2,
        latents="none",
        fixed={"use_resolution_binning": False},
        two_step_arguments=("intermediate_timesteps",),
        guided_above=NEVER,
        defaults=FamilyDefaults(2, 4.5, 1024, 32),
        tasks=_tasks("SanaSprint", inpaint=False),
    ),
    "AuraFlowPipeline": Family(
        "AuraFlow",
        side_multiple=16,
        tokens=256,
        sends_levels=("sigmas",),
        defaults=FamilyDefaults(50, 3.5, 1024),
        tasks={"text": "AuraFlowPipeline"},
    ),
    "CogView4Pipeline": Family(
        "CogView4",
        side_multiple=16,
        tokens=1024,
        shares_passes=False,
        sends_levels=("sigmas", "timesteps"),
        defaults=FamilyDefaults(50, 5.0, 1024),
        tasks={"text": "CogView4Pipeline"},
    ),
    "Kandinsky5T2IPipeline": replace(_KANDINSKY, tasks={"text": "Kandinsky5T2IPipeline"}),
    "Kandinsky5I2IPipeline": replace(_KANDINSKY, name="Kandinsky 5 edit", tasks={"edit": "Kandinsky5I2IPipeline"}),
    "Krea2Pipeline": Family(
        "Krea 2",
        side_multiple=16,
        tokens=512,
        latents="packed",
        guided_above=0.0,
        shares_passes=False,
        sends_levels=("sigmas",),
        defaults=FamilyDefaults(28, 4.5, 1024),
        tasks={"text": "Krea2Pipeline"},
    ),
    "ErnieImagePipeline": Family(
        "ERNIE-Image",
        side_multiple=16,
        latents="patched",
        shares_passes=False,
        sends_levels=("sigmas",),
        unfit_schedulers=("UniPCMultistepScheduler",),
        fixed={"use_pe": False},
        defaults=FamilyDefaults(50, 4.0, 1024),
        tasks={"text": "ErnieImagePipeline"},
    ),
    "Ideogram4Pipeline": Family(
        "Ideogram 4",
        side_multiple=16,
        tokens=2048,
        latents="patched channels last",
        shares_passes=False,
        guided_above=ALWAYS,
        sends_levels=("sigmas",),
        unfit_schedulers=("UniPCMultistepScheduler",),
        fixed={"guidance_schedule": None},
        defaults=FamilyDefaults(48, 7.0, 1024),
        tasks={"text": "Ideogram4Pipeline"},
    ),
    "BriaFiboPipeline": _FIBO,
    "BriaFiboEditPipeline": replace(
        _FIBO,
        name="FIBO Edit",
        takes_references=True,
        prompt_key="edit_instruction",
        tasks={"edit": "BriaFiboEditPipeline"},
    ),
    "BriaFibo2Pipeline": replace(
        _FIBO,
        name="FIBO 2",
        tokens=4096,
        latents="unpatched",
        structure=None,
        takes_references=True,
        needs_torchvision=True,
        tasks={"text": "BriaFibo2Pipeline", "edit": "BriaFibo2Pipeline"},
    ),
}

# Pipelines of diffusers that make no pictures; each name is the beginning of a class's name.
_OTHER_MEDIA: Mapping[str, tuple[str, ...]] = {
    "videos": (
        "Allegro", "AnimateDiff", "AnyFlow", "ChronoEdit", "CogVideoX", "ConsisID", "Cosmos", "EasyAnimate", "Helios",
        "HunyuanSkyreels", "HunyuanVideo", "I2VGenXL", "Kandinsky5I2V", "Kandinsky5T2V", "Kandinsky6", "LTX", "Latte",
        "LucyEdit", "Mochi", "MotifVideo", "PIA", "SanaImageToVideo", "SanaVideo", "SanaWM", "SkyReels",
        "StableVideoDiffusion", "TextToVideo", "VideoToVideo", "Wan",
    ),
    "sound": (
        "AceStep", "AudioLDM", "DanceDiffusion", "LongCatAudioDiT", "MusicLDM", "SpectrogramDiffusion", "StableAudio",
    ),
    "proteins": ("RFD4Proteina",),
}  # fmt: skip


def family_of(
    pipeline: str,
    index: Mapping[str, Any] | None = None,
    denoiser: Mapping[str, Any] | None = None,
    card: str = "",
) -> Family:
    """Return the row of a pipeline class, as a base's index, its denoiser's configuration and its card have it.

    A class without a row gets the values that most have, and `is_known` False.
    """
    row = FAMILIES.get(pipeline)
    if row is None:
        return Family(pipeline.removesuffix("Pipeline"), shares_passes=False, latents="none", is_known=False)
    index, denoiser = index or {}, denoiser or {}
    row = replace(row, defaults=row.defaults.with_sample_size(denoiser))
    if index.get("is_distilled"):
        row = replace(row, guided_above=NEVER, reads_guidance=False, defaults=_distilled(row.defaults, 1.0))
    elif denoiser.get("guidance_embeds") is False and row.guided_above == NEVER:
        row = replace(row, reads_guidance=False, defaults=_distilled(row.defaults, 0.0))
    elif denoiser.get("time_cond_proj_dim"):  # a UNet that takes guidance as a number is never run twice
        row = replace(row, guided_above=NEVER, defaults=_distilled(row.defaults, 8.0))
    return replace(row, defaults=row.defaults.with_card(card, row.guidance))


def _distilled(defaults: FamilyDefaults, guidance_scale: float) -> FamilyDefaults:
    return replace(defaults, steps=DISTILLED_STEPS, guidance_scale=guidance_scale)


def other_medium(pipeline: str) -> str | None:
    """Say what a pipeline class makes, where that is no pictures."""
    return next((what for what, names in _OTHER_MEDIA.items() if pipeline.startswith(names)), None)
