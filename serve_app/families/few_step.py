"""Published adapters that draw in a few steps, and the sampling that their authors say they need.

Data, by the id of the repository or the name of the file, in any folder. Each row names the page of its
author that states the values.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from serve_app.adapter_defaults import NO_DEFAULTS, AdapterDefaults


@dataclass(frozen=True, slots=True)
class FewStepRow:
    """A pattern of names, in lower case with `_` for every space and dash, and what holds for them.

    Its group `steps`, where it has one, is the number of steps.
    """

    pattern: str
    defaults: AdapterDefaults


_UNGUIDED = 0.0
_DMD2 = (999, 749, 499, 249)

ROWS = (
    # huggingface.co/latent-consistency/lcm-lora-sdxl, lcm-lora-sdv1-5, lcm-lora-ssd-1b
    FewStepRow(
        r"lcm_lora_(sdxl|sdv1_5|ssd_1b)|lcm_sd15_lora|lcm_sdxl_lora",
        AdapterDefaults(steps=4, guidance_scale=_UNGUIDED, scheduler="LCM"),
    ),
    # huggingface.co/ByteDance/Hyper-SD: one step by TCD, two and more by DDIM with trailing steps
    FewStepRow(r"hyper_(sd15|sdxl)_1step_lora", AdapterDefaults(steps=1, guidance_scale=_UNGUIDED, scheduler="TCD")),
    FewStepRow(
        r"hyper_(sd15|sdxl)_(?P<steps>\d+)steps?_lora",
        AdapterDefaults(guidance_scale=_UNGUIDED, scheduler="DDIM Trailing"),
    ),
    FewStepRow(
        r"hyper_(sd15|sdxl)_(?P<steps>\d+)steps_cfg_lora",
        AdapterDefaults(guidance_scale=5.0, scheduler="DDIM Trailing"),
    ),
    FewStepRow(r"hyper_flux\.1_dev_(?P<steps>\d+)steps_lora", AdapterDefaults(scale=0.125, guidance_scale=3.5)),
    FewStepRow(r"hyper_sd3_4steps_cfg_lora", AdapterDefaults(scale=0.125, steps=4, guidance_scale=3.0)),
    FewStepRow(r"hyper_sd3_(?P<steps>8|16)steps_cfg_lora", AdapterDefaults(scale=0.125, guidance_scale=5.0)),
    # huggingface.co/ByteDance/SDXL-Lightning
    FewStepRow(
        r"sdxl_lightning_(?P<steps>[248])step_lora",
        AdapterDefaults(guidance_scale=_UNGUIDED, scheduler="Euler Trailing"),
    ),
    # huggingface.co/tianweiy/DMD2
    FewStepRow(r"dmd2_sdxl_4step_lora", AdapterDefaults(timesteps=_DMD2, guidance_scale=_UNGUIDED, scheduler="LCM")),
    # huggingface.co/h1t/TCD-SDXL-LoRA, TCD-SD15-LoRA
    FewStepRow(r"tcd_(sdxl|sd15)_lora", AdapterDefaults(steps=4, guidance_scale=_UNGUIDED, scheduler="TCD")),
    # huggingface.co/alimama-creative/FLUX.1-Turbo-Alpha
    FewStepRow(r"flux\.1_turbo_alpha", AdapterDefaults(steps=8, guidance_scale=3.5)),
    # the difference of huggingface.co/stabilityai/sdxl-turbo to its base, as an adapter
    FewStepRow(
        r"sd_xl_turbo_lora(_v1)?",
        AdapterDefaults(
            steps=4,
            guidance_scale=_UNGUIDED,
            scheduler="EulerAncestralDiscreteScheduler",
            scheduler_options=(("timestep_spacing", "trailing"),),
        ),
    ),
)
_COMPILED = tuple((re.compile(rf"{row.pattern}(_(fp16|bf16|fp32|64))?"), row.defaults) for row in ROWS)


def few_step_defaults(model: str, filename: str) -> AdapterDefaults:
    """Return the sampling that a published few-step adapter needs, by its file's name, else by its id's last part."""
    for name in (filename.rpartition("/")[2].removesuffix(".safetensors"), model.rpartition("/")[2]):
        spelt = re.sub(r"[ -]", "_", name.lower())
        for pattern, defaults in _COMPILED:
            found = pattern.fullmatch(spelt)
            if found is not None:
                steps = found.groupdict().get("steps")
                return defaults if steps is None else AdapterDefaults(steps=int(steps)).over(defaults)
    return NO_DEFAULTS
