"""Schedulers are made without the loops over all training steps with which some classes begin, and are the same."""

from __future__ import annotations

import diffusers
import pytest
import torch

from serve_app.engine.base.schedulers import NoiseSchedulers
from serve_app.families.schedulers import SCHEDULERS
from serve_app.families.table import family_of
from tests.engine_cases import base_config


@pytest.mark.parametrize("name", SCHEDULERS["noise"])
def test_a_scheduler_is_the_one_that_diffusers_makes(name: str) -> None:
    own = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    choice = SCHEDULERS["noise"][name]
    theirs = getattr(diffusers, choice.class_name).from_config({**own.config, **choice.options})
    made = NoiseSchedulers(base_config("sd15"), own, family_of("StableDiffusionPipeline", {})).fresh(name)
    assert isinstance(made, type(theirs))
    assert type(made).__name__ == type(theirs).__name__
    assert made.config == theirs.config
    for scheduler in (made, theirs):
        scheduler.set_timesteps(7)
    assert torch.equal(made.timesteps, theirs.timesteps)
    assert vars(made).keys() - vars(theirs).keys() <= {"host_timesteps", "sent_timesteps"}
    assert vars(theirs).keys() <= vars(made).keys()
    assert torch.equal(*(getattr(one, "sigmas", one.alphas_cumprod) for one in (made, theirs)))
