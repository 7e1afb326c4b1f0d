"""Noise has diffusers' bits, and no step waits for the device to take it."""

from __future__ import annotations

import sys
from typing import Any

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
DRAWS = ("EulerAncestralDiscreteScheduler", "LCMScheduler", "DDPMScheduler")


class Copies(TorchDispatchMode):
    """Notes of each copy to another device whether the host would wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note a copy, and do it."""
        kwargs = kwargs or {}
        if func.overloadpacket.__name__ == "_to_copy" and kwargs.get("device") != args[0].device:
            self.waits.append(not kwargs.get("non_blocking", False))
        return func(*args, **kwargs)


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("seeds", [(1,), (1, 2)])
def test_noise_has_the_bits_of_diffusers(seeds: tuple[int, ...]) -> None:
    shape = (len(seeds), *SHAPE[1:])
    theirs = randn_tensor(shape, generator=seeded(*seeds), device=torch.device("cpu"), dtype=torch.float16)
    assert torch.equal(noise_for(shape, generator=seeded(*seeds), dtype=torch.float16), theirs)


@pytest.mark.parametrize("name", DRAWS)
def test_a_step_on_a_device_does_not_wait_for_its_noise(name: str) -> None:
    pipeline: Any = tiny_pipeline("sd15")
    scheduler = NoiseSchedulers(base_config("sd15"), pipeline.scheduler, loaded_family(pipeline)).fresh(name)
    module = sys.modules[type(scheduler).__module__]
    with Copies() as copies:  # of a device that is pretended
        drawn: Any = vars(module)["randn_tensor"](SHAPE, generator=seeded(1, 2), device=torch.device("meta"))
    assert drawn.is_meta
    assert copies.waits == [False]
