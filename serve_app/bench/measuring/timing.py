"""How long a step takes: the clock on the wall, the processor's time, and the device's own.

Owns the clocks and the medians. On a shared machine the processor's time is the steadier number.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from statistics import median
from typing import Generic, TypeVar

import torch


class Step(StrEnum):
    """Everything that a swap benchmark times."""

    LOAD = "diffusers.load_lora_weights"
    FUSE = "diffusers.fuse_lora"
    UNFUSE = "diffusers.unfuse_lora"
    UNLOAD = "diffusers.unload_lora_weights"
    HOTSWAP = "diffusers.hotswap"
    SET_ADAPTERS = "diffusers.set_adapters"
    READ = "loraplex.read"
    READ_KOHYA = "loraplex.read_kohya"
    WRITE_CANONICAL = "loraplex.write_canonical"
    READ_CANONICAL = "loraplex.read_canonical"
    TO_DEVICE = "loraplex.to_device"
    FIRST_SWAP = "loraplex.first_swap"
    APPLY = "loraplex.apply"
    SWAP = "loraplex.swap"
    SWAP_RESIDENT = "loraplex.swap_resident"
    CALLS = "loraplex.calls"
    PREPARE = "loraplex.prepare"
    BIND = "loraplex.bind"
    RESTORE = "loraplex.restore"
    STEADY_IMAGE = "stream.image_without_change"
    CHANGING_IMAGE = "stream.image_with_change"
    PREPARED_IMAGE = "stream.image_with_prepared_change"
    HOTSWAP_IMAGE = "stream.image_with_hotswap"
    FOUR_CALLS_IMAGE = "stream.image_with_four_calls"


Named = TypeVar("Named", bound=StrEnum)


@dataclass(frozen=True, slots=True)
class Timing:
    """One measurement, or the medians of several; `cpu_ms` counts all threads of this process."""

    wall_ms: float
    cpu_ms: float
    device_ms: float | None

    def __add__(self, other: Timing) -> Timing:
        """Return the time of both, one after the other."""
        is_whole = self.device_ms is not None and other.device_ms is not None
        device_ms = (self.device_ms or 0) + (other.device_ms or 0) if is_whole else None
        return Timing(self.wall_ms + other.wall_ms, self.cpu_ms + other.cpu_ms, device_ms)


class Stopwatch(Generic[Named]):
    """Times steps and keeps every measurement; a step that fails is not kept.

    On a GPU a step begins and ends with an idle device, so that its wall time is the whole of it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._timings: dict[Named, list[Timing]] = {}

    @contextmanager
    def timed(self, step: Named, *, counts_device: bool = True) -> Iterator[None]:
        """Time the block as one measurement of `step`.

        `counts_device` False leaves the device's own clock out: it sees the current stream alone, not one beside it.
        """
        start, end = self._events() if counts_device else (None, None)
        self._wait()
        if start is not None:
            start.record()
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        if end is not None:
            end.record()
        self._wait()
        cpu_ms, wall_ms = (time.process_time() - cpu) * 1e3, (time.perf_counter() - wall) * 1e3
        device_ms = start.elapsed_time(end) if start is not None and end is not None else None
        self._timings.setdefault(step, []).append(Timing(wall_ms, cpu_ms, device_ms))

    def forget(self, *, but: Named | None = None) -> None:
        """Drop what was measured so far, such as a first round that allocates and imports, but for one step."""
        self._timings = {step: timings for step, timings in self._timings.items() if step == but}

    def medians(self) -> dict[Named, Timing]:
        """Return the median of each clock for each step that was timed, in the order of their definition."""
        return {step: median_of(self._timings[step]) for step in sorted(self._timings, key=_place)}

    def timings(self, step: Named) -> Sequence[Timing]:
        """Return the measurements of a step in their order."""
        return self._timings[step]

    def _events(self) -> tuple[torch.cuda.Event | None, torch.cuda.Event | None]:
        if self._device.type != "cuda":
            return None, None
        return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _place(step: StrEnum) -> int:
    return list(type(step)).index(step)


def median_of(timings: Sequence[Timing]) -> Timing:
    """Return the median of each clock."""
    device = [timing.device_ms for timing in timings if timing.device_ms is not None]
    return Timing(
        median(timing.wall_ms for timing in timings),
        median(timing.cpu_ms for timing in timings),
        median(device) if device else None,
    )
