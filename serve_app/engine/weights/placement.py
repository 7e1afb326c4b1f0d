"""Where a replica keeps its base weights, and whether it prefetches swaps: chosen once, from what is free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch

# What CUDA itself takes for each process, which torch does not count.
CONTEXT_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class WeightPlacement:
    """The chosen placement. With the base weights on the host, swaps cannot be prefetched.

    `kept_sets` is how many further sets of fused buffers there may be, for compositions that come again.
    """

    base_weights: Literal["device", "host"]
    prefetches_swap: bool
    kept_sets: int = 0

    @property
    def buffer_sets(self) -> int:
        """How many sets of fused buffers the device must hold: for what is bound and comes next."""
        return 0 if self.base_weights == "host" else 2 if self.prefetches_swap else 1

    @property
    def fused_sets(self) -> int:
        """How many sets of fused buffers the device may hold in all."""
        return max(self.buffer_sets, 1) + self.kept_sets


def choose_placement(
    base_weights: Literal["auto", "device", "host"],
    prefetch_swap: Literal["auto", "always", "never"],
    *,
    layer_bytes: int,
    reserved_bytes: int,
    free_bytes: int | None,
    cache_bytes: int = 0,
) -> WeightPlacement:
    """Choose from what the configuration asks for and what the device has left.

    Args:
        base_weights: Where the base weights should be kept.
        prefetch_swap: Whether the next request's adapters should be fused while a request runs.
        layer_bytes: The size of all layers that adapters may change; their fused buffers may need as much, and as much
            again where swaps are prefetched.
        reserved_bytes: Other memory that the device will need.
        free_bytes: The memory that the GPU has left with the base loaded; None without one.
        cache_bytes: The most that fused buffers of repeated compositions may take, as far as it is free.
    """
    chosen = _placement(base_weights, prefetch_swap, layer_bytes, reserved_bytes, free_bytes)
    if chosen.base_weights == "host" or layer_bytes == 0:
        return chosen
    if free_bytes is not None:
        cache_bytes = min(cache_bytes, free_bytes - reserved_bytes - chosen.buffer_sets * layer_bytes)
    return replace(chosen, kept_sets=max(cache_bytes // layer_bytes, 0))


def _placement(
    base_weights: Literal["auto", "device", "host"],
    prefetch_swap: Literal["auto", "always", "never"],
    layer_bytes: int,
    reserved_bytes: int,
    free_bytes: int | None,
) -> WeightPlacement:
    if free_bytes is None:
        place: Literal["device", "host"] = "host" if base_weights == "host" else "device"
        return WeightPlacement(place, prefetches_swap=place == "device" and prefetch_swap == "always")
    room = free_bytes - reserved_bytes
    if base_weights == "host" or (base_weights == "auto" and room < layer_bytes):
        return WeightPlacement("host", prefetches_swap=False)
    is_roomy = base_weights == "device" or room >= 2 * layer_bytes
    return WeightPlacement("device", prefetch_swap == "always" or (prefetch_swap == "auto" and is_roomy))


def free_bytes_of(device: torch.device, gpu_fraction: float = 1.0) -> int | None:
    """Return what a replica could still take of a GPU's memory, torch's own spare blocks included; None without one.

    `gpu_fraction` is the replica's share of the GPU.
    """
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    held, used = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    return bytes_within_share(total, free + held - used, used, gpu_fraction)


def bytes_within_share(total_bytes: int, free_bytes: int, used_bytes: int, gpu_fraction: float) -> int:
    """Return the bytes that one of several replicas on a GPU may still take: free ones, at most its share's rest.

    Others may not have taken theirs yet.
    """
    return min(free_bytes, share_bytes(total_bytes, gpu_fraction) - used_bytes)


def share_bytes(total_bytes: int, gpu_fraction: float) -> int:
    """Return what torch may take for a replica; one of a whole GPU or more, or of none given, has all of it."""
    if not 0 < gpu_fraction < 1:
        return total_bytes
    return max(int(total_bytes * gpu_fraction) - CONTEXT_BYTES, 0)


def fence_share(
    device: torch.device,
    gpu_fraction: float,
    *,
    total_bytes: Callable[[], int] = lambda: torch.cuda.mem_get_info()[1],
    set_fraction: Callable[[float], None] = torch.cuda.set_per_process_memory_fraction,
) -> None:
    """Have torch keep to a replica's share of a GPU, so that none takes what another counts on.

    What it asks for beyond that is a shortage of its own. To be called before anything is on the device.
    """
    if device.type == "cuda" and 0 < gpu_fraction < 1:
        total = total_bytes()
        set_fraction(share_bytes(total, gpu_fraction) / total)
