"""Where the pristine weights of a replica live, and whether it may prepare ahead: chosen once, from what is free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

TargetLayer = Literal["device", "host"]


@dataclass(frozen=True, slots=True)
class WeightPlacement:
    """The chosen placement. With the base weights on the host, swaps cannot be prefetched."""

    pristine_in: TargetLayer
    prepares_ahead: bool


def choose_placement(
    pristine_in: Literal["auto", "device", "host"],
    prepare_ahead: Literal["auto", "always", "never"],
    *,
    layer_bytes: int,
    reserved_bytes: int,
    free_bytes: int | None,
) -> WeightPlacement:
    """Choose from what the configuration asks for and what the device has left.

    Args:
        pristine_in: Where the pristine weights should live.
        prepare_ahead: Whether the next request's adapters should be fused while a request runs.
        layer_bytes: What all layers that adapters may change take; their twins may need as much, and as much again
            where they are prepared ahead.
        reserved_bytes: What else will be taken of the device.
        free_bytes: What the GPU has left with the base loaded; None without one.
    """
    if free_bytes is None:
        place: TargetLayer = "host" if pristine_in == "host" else "device"
        return WeightPlacement(place, prepares_ahead=place == "device" and prepare_ahead == "always")
    room = free_bytes - reserved_bytes
    if pristine_in == "host" or (pristine_in == "auto" and room < layer_bytes):
        return WeightPlacement("host", prepares_ahead=False)
    is_roomy = pristine_in == "device" or room >= 2 * layer_bytes
    return WeightPlacement("device", prepare_ahead == "always" or (prepare_ahead == "auto" and is_roomy))


def free_bytes_of(device: torch.device) -> int | None:
    """Return what could still be taken of a GPU's memory, torch's own spare blocks included; None without a GPU."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
