"""How much memory a run needs, has, and took at its peak.

Owns the estimate that refuses a run before it would be killed.
"""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path

import psutil
import torch

from serve_app.bench.measuring.options import BenchmarkRefused, SwapOptions

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
CGROUP = Path("/sys/fs/cgroup")
# Libraries, the file that is being written, and what the allocator keeps.
OVERHEAD_BYTES = 1536 * 1024**2
# The adapters of a run: two in our form, diffusers' copy of one while it loads it, and the file in memory.
ADAPTERS_HELD = 4


def check_memory(
    options: SwapOptions, *, base_bytes: int, touched_bytes: int, factor_bytes: int, largest_weight: int
) -> None:
    """Refuse a run that would not fit.

    `largest_weight` is the largest layer's number of values: products are made in 32 bits, twice.

    Raises:
        BenchmarkRefused: less memory is free than the run needs.
    """
    needed = (
        base_bytes
        + options.buffer_sets_held * touched_bytes
        + ADAPTERS_HELD * factor_bytes
        + largest_weight * 12
        + OVERHEAD_BYTES
    )
    free = free_bytes(torch.device(options.device))
    if needed > free:
        size = "narrow " if options.is_narrow else ""
        raise BenchmarkRefused(
            f"{size}{options.model} in {options.dtype} with {options.targets} adapters needs about "
            f"{needed / 1e9:.1f} GB of {options.device} memory, but {free / 1e9:.1f} GB is free; "
            "choose --narrow, --no-prepare, fewer targets, a 16-bit dtype or a larger machine"
        )


def check_room(what: str, needed: int, free: int, where: str) -> None:
    """Refuse a run that would not fit; `needed` and `free` are bytes.

    Raises:
        BenchmarkRefused: less is free than the run needs.
    """
    if needed > free:
        raise BenchmarkRefused(
            f"{what} needs about {needed / 1e9:.1f} GB of {where}, but {free / 1e9:.1f} GB is free; "
            "choose a smaller model, a 16-bit dtype or a larger machine"
        )


def free_bytes(device: torch.device) -> int:
    """Return the memory that a run may take: the device's, or the host's within this container's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    within = free_within(CGROUP)
    return free if within is None else min(free, within)


def free_within(cgroup: Path) -> int | None:
    """Return the bytes that are left of a container's limit, None where it has none; `cgroup` is its folder.

    Cached files not used recently count as free, as the kernel drops them first: the working set of Kubernetes.
    """
    limit = cgroup / "memory.max"
    if not limit.exists() or not (most := limit.read_text().strip()).isdigit():
        return None
    used = int((cgroup / "memory.current").read_text())
    counts = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    # The two are read one after the other, and may part in between.
    return int(most) - max(0, used - int(counts["inactive_file"]))


def reset_peak(device: torch.device) -> int:
    """Start a new peak where the system can; return the bytes that are in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with contextlib.suppress(OSError):
        CLEAR.write_text("5")  # Linux: forget the largest resident size
    return psutil.Process().memory_info().rss


def peak_bytes(device: torch.device) -> int:
    """Return the most bytes in use so far: the device's allocations, or this process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if STATUS.exists():
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
