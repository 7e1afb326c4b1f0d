"""The table of base families: one row for each pipeline class that a `model_index.json` may name.

Owns the rows, the classes that make videos or sound, and how a base's own configuration changes its row. A new family
of the usual kind is one row here and one tiny pipeline in `tests/tiny_families`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from serve_app.families.family import ALWAYS, NEVER, Family, Task


def _tasks(prefix: str, *, inpaint: bool = True) -> dict[Task, str]:
    """Return the three classes that a family has by diffusers' own way of naming."""
    found: dict[Task, str] = {"text": f"{prefix}Pipeline", "image": f"{prefix}Img2ImgPipeline"}
    return {**found, "inpaint": f"{prefix}InpaintPipeline"} if inpaint else found


_FLUX = Family(
    "FLUX.1", side_multiple=16, tokens=512, latents="packed", guided_above=NEVER, has_own_true_cfg=True,
    sends_levels=("sigmas",),
    tasks=_tasks("Flux"),
)  # fmt: skip
_FLUX_2 = Family(
    "FLUX.2", side_multiple=16, tokens=512, latents="patched", shares_passes=False, sends_levels=("sigmas",),
    takes_references=True, max_aspect_ratio=8.0,
)  # fmt: skip
# One step is NaN: the schedule is stretched to end at `shift_terminal`, which one step alone cannot.
_QWEN = Family(
    "Qwen-Image", side_multiple=16, tokens=512, latents="packed", guidance=("true_cfg_scale",), min_steps=2,
    sends_levels=("sigmas",),
    tasks=_tasks("QwenImage"),
)  # fmt: skip
_SD3 = Family("SD3", side_multiple=16, tokens=256, tasks=_tasks("StableDiffusion3"))
_KANDINSKY = Family(
    "Kandinsky 5", side_multiple=16, tokens=512, latents="channels last", shares_passes=False, needs_torchvision=True,
    area_parameter="resolutions",
)  # fmt: skip

FAMILIES: Mapping[str, Family] = {
    "StableDiffusionPipeline": Family("SD", tasks=_tasks("StableDiffusion")),
    "StableDiffusionInpaintPipeline": Family("SD inpainting", tasks={"inpaint": "StableDiffusionInpaintPipeline"}),
    "StableDiffusionInstructPix2PixPipeline": Family(
        "InstructPix2Pix", tasks={"edit": "StableDiffusionInstructPix2PixPipeline"}, guided_runs=3
    ),
    "LatentConsistencyModelPipeline": Family(
        "LCM",
        tasks=_tasks("LatentConsistencyModel", inpaint=False),
        guided_above=NEVER,
        sends_levels=("original_inference_steps",),
        unfit_schedulers=("TCDScheduler",),
    ),
    "StableDiffusionXLPipeline": Family("SDXL", tasks=_tasks("StableDiffusionXL")),
    "StableDiffusionXLInpaintPipeline": Family(
        "SDXL inpainting", tasks={"inpaint": "StableDiffusionXLInpaintPipeline"}
    ),
    "StableDiffusionXLImg2ImgPipeline": Family(
        "SDXL refiner",
        tasks={"image": "StableDiffusionXLImg2ImgPipeline", "inpaint": "StableDiffusionXLInpaintPipeline"},
    ),
    "StableDiffusion3Pipeline": _SD3,
    "FluxPipeline": _FLUX,
    "FluxFillPipeline": replace(
        _FLUX, name="FLUX.1 Fill", tasks={"inpaint": "FluxFillPipeline"}, has_own_true_cfg=False
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
        tasks={"text": "Flux2KleinKVPipeline", "edit": "Flux2KleinKVPipeline"},
    ),
    # Its inpainting asks the denoiser for a setting that it does not have (diffusers 0.42).
    "ChromaPipeline": Family(
        "Chroma",
        side_multiple=16,
        tokens=512,
        latents="packed",
        sends_levels=("sigmas",),
        tasks=_tasks("Chroma", inpaint=False),
    ),
    "QwenImagePipeline": _QWEN,
    # Its inpainting draws a megapixel, whatever is asked (diffusers 0.42).
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
    "ZImagePipeline": Family(
        "Z-Image",
        side_multiple=16,
        tokens=512,
        guided_above=0.0,
        sends_levels=("sigmas",),
        unfit_schedulers=("UniPCMultistepScheduler",),
        tasks=_tasks("ZImage"),
    ),
    "HiDreamImagePipeline": Family(
        "HiDream",
        side_multiple=16,
        tokens=128,
        area_parameter="default_sample_size",
        sends_levels=("mu",),
        unfit_schedulers=("DEISMultistepScheduler", "DPMSolverMultistepScheduler"),
        tasks={"text": "HiDreamImagePipeline"},
    ),
    "Lumina2Pipeline": Family(
        "Lumina 2", side_multiple=16, tokens=256, sends_levels=("sigmas",), tasks={"text": "Lumina2Pipeline"}
    ),
    "SanaPipeline": Family(
        "Sana",
        side_multiple=32,
        tokens=300,
        fixed={"use_resolution_binning": False},
        tasks={"text": "SanaPipeline"},
    ),
    "SanaSprintPipeline": Family(
        "Sana-Sprint",
        side_multiple=32,
        tokens=300,
        latents="none",
        fixed={"use_resolution_binning": False},
        two_step_arguments=("intermediate_timesteps",),
        guided_above=NEVER,
        tasks=_tasks("SanaSprint", inpaint=False),
    ),
    "AuraFlowPipeline": Family(
        "AuraFlow", side_multiple=16, tokens=256, sends_levels=("sigmas",), tasks={"text": "AuraFlowPipeline"}
    ),
    "CogView4Pipeline": Family(
        "CogView4",
        side_multiple=16,
        tokens=1024,
        shares_passes=False,
        sends_levels=("sigmas", "timesteps"),
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
        tasks={"text": "Krea2Pipeline"},
    ),
    "ErnieImagePipeline": Family(
        "ERNIE-Image",
        side_multiple=16,
        latents="patched",
        shares_passes=False,
        sends_levels=("sigmas",),
        fixed={"use_pe": False},
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
        fixed={"guidance_schedule": None},
        tasks={"text": "Ideogram4Pipeline"},
    ),
}

# Pipelines of diffusers that make no pictures; each name is the beginning of a class's name.
_OTHER_MEDIA: Mapping[str, tuple[str, ...]] = {
    "videos": (
        "Allegro", "AnimateDiff", "AnyFlow", "ChronoEdit", "CogVideoX", "ConsisID", "Cosmos", "EasyAnimate", "Helios",
        "HunyuanSkyreels", "HunyuanVideo", "I2VGenXL", "Kandinsky5I2V", "Kandinsky5T2V", "LTX", "Latte", "LucyEdit",
        "Mochi", "PIA", "SanaImageToVideo", "SanaVideo", "SkyReels", "StableVideoDiffusion", "TextToVideo",
        "VideoToVideo", "Wan",
    ),
    "sound": ("AceStep", "AudioLDM", "DanceDiffusion", "MusicLDM", "StableAudio"),
}  # fmt: skip


def family_of(
    pipeline: str, index: Mapping[str, Any] | None = None, denoiser: Mapping[str, Any] | None = None
) -> Family:
    """Return the row of a pipeline class, as a base's `model_index.json` and its denoiser's `config.json` change it.

    A class without a row gets the values that most have, and `is_known` False.
    """
    row = FAMILIES.get(pipeline)
    if row is None:
        return Family(pipeline.removesuffix("Pipeline"), shares_passes=False, latents="none", is_known=False)
    index, denoiser = index or {}, denoiser or {}
    if index.get("is_distilled"):
        return replace(row, guided_above=NEVER, reads_guidance=False)
    if denoiser.get("guidance_embeds") is False and row.guided_above == NEVER:
        return replace(row, reads_guidance=False)
    # A UNet that takes guidance as a number is never run twice.
    return replace(row, guided_above=NEVER) if denoiser.get("time_cond_proj_dim") else row


def other_medium(pipeline: str) -> str | None:
    """Say what a pipeline class makes, where that is no pictures."""
    return next((what for what, names in _OTHER_MEDIA.items() if pipeline.startswith(names)), None)
