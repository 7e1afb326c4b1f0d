"""A few-step adapter that is only named draws as its authors say, to the bit of diffusers with these settings."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
)

from serve_app.catalog.catalog import Resolution
from serve_app.core import UnresolvedRequest
from serve_app.deployments.ingress.adapter_defaults import resolve_with_adapters
from serve_app.engine.drawing.pipeline import BasePipeline
from serve_app.families.few_step import few_step_defaults
from serve_app.families.table import family_of
from tests.engine_cases import base_config, load, one_image
from tests.tiny import tiny_folder

TRAILING = {"timestep_spacing": "trailing"}
CASES: list[tuple[str, str, type[Any], dict[str, Any], dict[str, Any]]] = [
    ("sd15", "latent-consistency/lcm-lora-sdv1-5", LCMScheduler, {}, {"num_inference_steps": 4}),
    ("sdxl", "Hyper-SDXL-2steps-lora", DDIMScheduler, TRAILING, {"num_inference_steps": 2}),
    ("sd15", "Hyper-SD15-8steps-CFG-lora", DDIMScheduler, TRAILING, {"num_inference_steps": 8, "guidance_scale": 5}),
    ("sdxl", "Hyper-SDXL-1step-lora", TCDScheduler, {}, {"num_inference_steps": 1}),
    ("sdxl", "sdxl_lightning_4step_lora", EulerDiscreteScheduler, TRAILING, {"num_inference_steps": 4}),
    ("sdxl", "dmd2_sdxl_4step_lora_fp16", LCMScheduler, {}, {"timesteps": [999, 749, 499, 249]}),
    ("sdxl", "sd_xl_turbo_lora_v1", EulerAncestralDiscreteScheduler, TRAILING, {"num_inference_steps": 4}),
]


@cache
def bases(family: str) -> tuple[BasePipeline, Any, Any]:
    """Our base, diffusers' own pipeline, and the configuration of its scheduler."""
    plain = DiffusionPipeline.from_pretrained(tiny_folder(family))
    plain.set_progress_bar_config(disable=True)
    return load(family), plain, plain.scheduler.config


@pytest.mark.parametrize(("family", "name", "scheduler", "options", "arguments"), CASES, ids=[one[1] for one in CASES])
def test_a_few_step_adapter_runs_its_schedule_by_being_named_alone(
    family: str, name: str, scheduler: type[Any], options: dict[str, Any], arguments: dict[str, Any]
) -> None:
    ours, plain, scheduler_config = bases(family)
    resolution = Resolution(
        base_config(family, defaults={"width": 64, "height": 64}), (), few_step_defaults(name, f"{name}.safetensors")
    )
    asked = UnresolvedRequest("a photo of a cat")
    row = family_of(type(plain).__name__)
    drawn = one_image(ours, resolve_with_adapters(asked, resolution, request_id="r", seed=7, family=row))
    plain.scheduler = scheduler.from_config(scheduler_config, **options)
    published = {"guidance_scale": 0, **arguments}
    noise = torch.Generator().manual_seed(7)
    expected = plain(asked.prompt, width=64, height=64, generator=noise, **published).images[0]
    assert drawn.pixels == expected.tobytes()
