"""Noise that a scheduler draws at each step, sent to the device without waiting for it.

Generators are the host's, so that a seed gives the same bits on every device. Diffusers sends what they draw from
ordinary memory, for which the host waits until the device has done all it was given: once a step with ancestral
schedulers, LCM and DDPM. From page-locked memory it goes by the way.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

_NAME = "randn_tensor"


def send_noise_without_waiting(scheduler: Any) -> None:
    """Have a scheduler's class draw its noise by `noise_for`; diffusers has no parameter for that."""
    for each in type(scheduler).__mro__:
        module = sys.modules[each.__module__]
        if getattr(module, _NAME, None) is randn_tensor:
            setattr(module, _NAME, noise_for)


def noise_for(
    shape: tuple[int, ...] | list[int],
    generator: list[torch.Generator] | torch.Generator | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
) -> Tensor:
    """Return what diffusers' `randn_tensor` does; what a generator of the host draws is not waited for."""
    first = generator[0] if isinstance(generator, list) else generator
    target = torch.device(device or "cpu")
    if first is None or first.device.type != "cpu" or target.type == "cpu":
        return randn_tensor(shape, generator=generator, device=target, dtype=dtype, layout=layout)
    drawn = randn_tensor(shape, generator=generator, device=torch.device("cpu"), dtype=dtype, layout=layout)
    return _page_locked(drawn).to(target, non_blocking=True)


def _page_locked(tensor: Tensor) -> Tensor:
    """Return a page-locked copy, which torch keeps until the device has read it; else the tensor itself."""
    try:
        return tensor.pin_memory()
    except RuntimeError:
        return tensor
