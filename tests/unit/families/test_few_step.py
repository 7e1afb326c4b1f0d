from __future__ import annotations

import pytest

from serve_app.adapter_defaults import NO_DEFAULTS
from serve_app.families.few_step import ROWS, few_step_defaults
from serve_app.families.schedulers import REQUEST_OPTIONS, is_known_name


@pytest.mark.parametrize(
    ("model", "filename", "steps", "scheduler", "guidance"),
    [
        ("latent-consistency/lcm-lora-sdxl", "pytorch_lora_weights.safetensors", 4, "LCM", 0.0),
        ("ByteDance/Hyper-SD", "Hyper-SDXL-8steps-lora.safetensors", 8, "DDIM Trailing", 0.0),
        ("ByteDance/Hyper-SD", "Hyper-SD15-12steps-CFG-lora.safetensors", 12, "DDIM Trailing", 5.0),
        ("ByteDance/Hyper-SD", "Hyper-SDXL-1step-lora.safetensors", 1, "TCD", 0.0),
        ("fast/Hyper SDXL 4steps lora", "Hyper SDXL 4steps lora.safetensors", 4, "DDIM Trailing", 0.0),
        ("ByteDance/SDXL-Lightning", "sdxl_lightning_4step_lora.safetensors", 4, "Euler Trailing", 0.0),
        ("speed/dmd2_sdxl_4step_lora_fp16", "dmd2_sdxl_4step_lora_fp16.safetensors", None, "LCM", 0.0),
        ("alimama-creative/FLUX.1-Turbo-Alpha", "diffusion_pytorch_model.safetensors", 8, None, 3.5),
        ("turbo", "sd_xl_turbo_lora_v1.safetensors", 4, "EulerAncestralDiscreteScheduler", 0.0),
    ],
)
def test_a_published_few_step_adapter_is_known_by_its_id_or_its_file(
    model: str, filename: str, steps: int | None, scheduler: str | None, guidance: float
) -> None:
    found = few_step_defaults(model, filename)
    assert (found.steps, found.scheduler, found.guidance_scale) == (steps, scheduler, guidance)


def test_the_scale_and_the_timesteps_of_a_row_are_taken() -> None:
    assert few_step_defaults("x", "Hyper-FLUX.1-dev-8steps-lora.safetensors").scale == 0.125
    assert few_step_defaults("x", "dmd2_sdxl_4step_lora.safetensors").timesteps == (999, 749, 499, 249)


@pytest.mark.parametrize("name", ["lcm", "my-lcm-lora-sdxl-style", "lightning", "sdxl_lightning_4step", "hyper"])
def test_another_name_with_such_words_is_not_taken_for_one(name: str) -> None:
    assert few_step_defaults(f"me/{name}", f"{name}.safetensors") == NO_DEFAULTS


def test_every_row_names_a_scheduler_and_options_that_a_request_may_name() -> None:
    for row in ROWS:
        assert row.defaults.scheduler is None or is_known_name(row.defaults.scheduler)
        assert {name for name, _ in row.defaults.scheduler_options} <= set(REQUEST_OPTIONS)
