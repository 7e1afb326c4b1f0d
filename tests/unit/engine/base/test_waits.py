"""Noise and timesteps have diffusers' bits, and no step of a scheduler waits for the device because of them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from inspect import signature
from typing import Any

import diffusers
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from serve_app.engine.base.noise import noise_for
from serve_app.engine.base.schedulers import NoiseSchedulers
from serve_app.engine.base.task_pipelines import loaded_family
from tests.engine_cases import base_config
from tests.tiny import tiny_pipeline

SHAPE = (2, 4, 8, 8)
READS_ONCE = ("DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler")
READS = ("DDIMScheduler", "DDPMScheduler", "LCMScheduler", "PNDMScheduler", "TCDScheduler", *READS_ONCE)
DRAWS = ("EulerAncestralDiscreteScheduler", "LCMScheduler", "DDPMScheduler")


class Copies(TorchDispatchMode):
    """Notes of each copy to another device whether the host would wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note a copy, and do it."""
        kwargs = kwargs or {}
        if func.overloadpacket.__name__ == "_to_copy" and kwargs.get("device") not in (None, args[0].device):
            self.waits.append(not kwargs.get("non_blocking", False))
        return func(*args, **kwargs)


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def fresh(name: str) -> Any:
    pipeline: Any = tiny_pipeline("sd15")
    return NoiseSchedulers(base_config("sd15"), pipeline.scheduler, loaded_family(pipeline)).fresh(name)


def stepped(scheduler: Any, as_given: Callable[[torch.Tensor], Any], device: str, begin: int) -> list[torch.Tensor]:
    """Return what each step gives, from the step `begin` on."""
    scheduler.set_timesteps(6, device=device)
    random = torch.Generator().manual_seed(0)
    sample, *predicted = torch.randn((20, *SHAPE), generator=random).half().to(device)
    more = {"generator": seeded(1, 2)} if "generator" in signature(scheduler.step).parameters else {}
    samples: list[torch.Tensor] = []
    for timestep, noise in zip(scheduler.timesteps[begin:], predicted, strict=False):
        sample = scheduler.step(noise, as_given(timestep), scheduler.scale_model_input(sample, timestep), **more)[0]
        samples.append(sample)
    return samples


@pytest.mark.parametrize("seeds", [(1,), (1, 2)])
def test_noise_has_the_bits_of_diffusers(seeds: tuple[int, ...]) -> None:
    shape = (len(seeds), *SHAPE[1:])
    theirs = randn_tensor(shape, generator=seeded(*seeds), device=torch.device("cpu"), dtype=torch.float16)
    assert torch.equal(noise_for(shape, generator=seeded(*seeds), dtype=torch.float16), theirs)


@pytest.mark.parametrize("name", DRAWS)
def test_a_step_on_a_device_does_not_wait_for_its_noise(name: str) -> None:
    scheduler = fresh(name)
    module = sys.modules[type(scheduler).__module__]
    with Copies() as copies:  # of a device that is pretended
        drawn: Any = vars(module)["randn_tensor"](SHAPE, generator=seeded(1, 2), device=torch.device("meta"))
    assert drawn.is_meta
    assert copies.waits == [False]


@pytest.mark.parametrize("name", READS)
def test_a_step_on_a_device_does_not_read_its_timestep_there(name: str) -> None:
    scheduler = fresh(name)
    with Copies() as copies:  # reading a value of the meta device raises
        samples = stepped(scheduler, lambda timestep: timestep, "meta", 0)
    assert all(sample.is_meta for sample in samples)
    assert copies.waits.count(True) == 2  # the timesteps, once a pass, and the test's own numbers


@pytest.mark.parametrize("begin", [0, 2])
@pytest.mark.parametrize("as_given", [lambda timestep: timestep, torch.clone, int], ids=["own", "copied", "number"])
@pytest.mark.parametrize("name", READS)
def test_steps_have_the_bits_of_diffusers(name: str, as_given: Callable[[torch.Tensor], Any], begin: int) -> None:
    ours = fresh(name)
    theirs = getattr(diffusers, name).from_config(ours.config)
    expected = stepped(theirs, lambda timestep: timestep, "cpu", begin)
    for sample, other in zip(stepped(ours, as_given, "cpu", begin), expected, strict=True):
        assert torch.equal(sample, other)
