"""The best this machine could do: the floor for a swap.

Owns the three rates: copying memory, multiplying factors, and crossing the bus. Each is the best of several tries.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from serve_app.bench.measuring.report import Floor, Sizes

TRIES = 5
COPIED_BYTES = 256 * 1024**2


@dataclass(frozen=True, slots=True)
class Touched:
    """The weights that a swap changes, and by factors of which inner width."""

    shapes: tuple[torch.Size, ...]
    rank: int


def measure_floor(touched: Touched, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Floor:
    """Measure the rates and work out the least time of a swap of these layers from host memory.

    Products are taken in float32 on a CPU, as peft and we do there, else in the weights' dtype. A swap can do no
    better than the slowest of the three, even where they overlap entirely.
    """
    copy_rate = _copy_rate(device)
    bus_rate = _bus_rate(device) if device.type == "cuda" else None
    operations, products_s = _products(touched.shapes, touched.rank, device, dtype)
    rewrite_ms = sizes.touched_bytes / copy_rate * 1e3
    bus_ms = sizes.factor_bytes / bus_rate * 1e3 if bus_rate is not None else None
    return Floor(
        copied_gb_per_s=copy_rate / 1e9,
        multiplied_gflop_per_s=operations / products_s / 1e9,
        bus_gb_per_s=bus_rate / 1e9 if bus_rate is not None else None,
        rewrite_ms=rewrite_ms,
        products_ms=products_s * 1e3,
        bus_ms=bus_ms,
        swap_ms=max(rewrite_ms, products_s * 1e3, bus_ms or 0.0),
    )


def _copy_rate(device: torch.device) -> float:
    """Return bytes copied per second within the device's memory; each is read once and written once."""
    source = torch.ones(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return COPIED_BYTES / _best_s(lambda: target.copy_(source), device)


def _bus_rate(device: torch.device) -> float:
    """Return bytes per second from page-locked host memory to the device."""
    source = torch.ones(COPIED_BYTES, dtype=torch.uint8).pin_memory()
    target = torch.empty(COPIED_BYTES, dtype=torch.uint8, device=device)
    return COPIED_BYTES / _best_s(lambda: target.copy_(source, non_blocking=True), device)


def _products(shapes: Iterable[torch.Size], rank: int, device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Return the operations of all products up @ down, and the seconds that they take one by one."""
    compute = torch.float32 if device.type == "cpu" else dtype
    operations = seconds = 0.0
    for (outputs, inputs), count in Counter((shape[0], shape[1:].numel()) for shape in shapes).items():
        up = torch.ones(outputs, rank, device=device, dtype=compute)
        down = torch.ones(rank, inputs, device=device, dtype=compute)
        out = torch.empty(outputs, inputs, device=device, dtype=compute)
        seconds += count * _best_s(lambda up=up, down=down, out=out: torch.matmul(up, down, out=out), device)
        operations += 2.0 * count * outputs * inputs * rank
    return operations, seconds


def _best_s(work: Callable[[], object], device: torch.device) -> float:
    """Return the least seconds of several tries after a first one that does not count."""
    work()
    return min(_seconds(work, device) for _ in range(TRIES))


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1e3
    # Other processes of a shared machine must not raise the floor; several threads' time says nothing of their rate.
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    began = clock()
    work()
    return clock() - began
