"""The pipeline benchmark: each choice in a pipeline's set-up, both ways in turn, with what it does to the result.

Owns the order of the measurements and the count of the host's waits for the device.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from serve_app.bench.machine.choices import PROMPTS, Choice, choices_for, choices_for_narrow_sdxl
from serve_app.bench.measuring.hardware import describe_machine
from serve_app.bench.measuring.options import BenchmarkRefused, Device, PipelineOptions
from serve_app.bench.measuring.report import ChoiceRow, PipelineReport, WaitRow
from serve_app.bench.measuring.torch_setup import quiet, threads
from serve_app.config import BaseModelConfig
from serve_app.demo.embedded import BASES, embedded_root
from serve_app.engine.base.fetching import HubAccess, resolve_source
from serve_app.engine.base.loading import load_base
from serve_app.engine.base.schedulers import NoiseSchedulers
from serve_app.engine.base.task_pipelines import loaded_family
from serve_app.settings import ModelSource

WAITING = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal"}
EXTRA_STEPS = 4


def run_pipeline(options: PipelineOptions) -> PipelineReport:
    """Run the benchmark.

    Raises:
        BenchmarkRefused: the device is absent.
    """
    if options.device is Device.CUDA and not torch.cuda.is_available():
        raise BenchmarkRefused("--device cuda was asked for, but torch finds no CUDA device here; use --device cpu")
    device = torch.device(options.device)
    with threads(options.threads), quiet():
        machine = describe_machine(device, options.threads)
        rows = tuple(_measured(choice, options) for choice in _choices(options, device))
        waits = tuple(_waits(_demo(BASES[0], options, device)))
        return PipelineReport(
            command=options.command(),
            date=datetime.now(UTC).date().isoformat(),
            options=options,
            machine=machine,
            load_after=round(os.getloadavg()[0], 2),
            rows=rows,
            waits=waits,
        )


def _choices(options: PipelineOptions, device: torch.device) -> Iterator[Choice]:
    for base_id in BASES:
        yield from choices_for(base_id, _demo(base_id, options, device)[1], options)
    yield from choices_for_narrow_sdxl(options)


def _demo(base_id: str, options: PipelineOptions, device: torch.device) -> tuple[BaseModelConfig, Any]:
    """Load an embedded base as diffusers would leave it."""
    config = BaseModelConfig(
        id=base_id,
        source=ModelSource(embedded=base_id),
        dtype=options.dtype.value,
        memory_format="contiguous",
        vae_tiling="never",
    )
    source = resolve_source(config.source, embedded_root())
    pipeline: Any = load_base(config, source, {}, device=device, hub=HubAccess()).pipeline
    pipeline.vae.use_slicing = False
    return config, pipeline


def _measured(choice: Choice, options: PipelineOptions) -> ChoiceRow:
    is_on_gpu = options.device is Device.CUDA
    ways = (choice.set_usual, choice.set_other)
    results: list[Tensor] = []
    for set_up in ways:  # caches, and what each way gives
        set_up()
        results.append(choice.work().float())
    times: tuple[list[float], list[float]] = ([], [])
    peaks: list[int | None] = [None, None]
    for _ in range(options.repeats):
        for place, set_up in enumerate(ways):
            set_up()
            taken, peak = _timed(choice.work, is_on_gpu=is_on_gpu)
            times[place].append(taken)
            peaks[place] = peak
    choice.set_usual()
    ratios = [other / usual for usual, other in zip(*times, strict=True)]
    return ChoiceRow(
        subject=choice.subject,
        choice=choice.name,
        usual=choice.usual,
        other=choice.other,
        usual_ms=median(times[0]),
        other_ms=median(times[1]),
        ratio=median(ratios),
        ratios=(min(ratios), max(ratios)),
        largest_difference=(results[0] - results[1]).abs().max().item(),
        usual_peak_bytes=peaks[0],
        other_peak_bytes=peaks[1],
    )


def _timed(work: Callable[[], Tensor], *, is_on_gpu: bool) -> tuple[float, int | None]:
    """Return milliseconds, of the processor or of the wall, and what torch allocated on the device at most."""
    clock = time.perf_counter if is_on_gpu else time.process_time
    if is_on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began = clock()
    work()
    if is_on_gpu:
        torch.cuda.synchronize()
    taken = (clock() - began) * 1e3
    return taken, torch.cuda.max_memory_allocated() if is_on_gpu else None


class _Waits(TorchDispatchMode):
    """Counts the operations whose outcome the host must know before it goes on, and copies that it waits for.

    On a GPU only those count that concern it: schedulers keep numbers of theirs on the host.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device_type = device.type
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one operation, and do it."""
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        if name in WAITING:
            self.count += args[0].device.type == self._device_type
        elif name == "_to_copy" and not kwargs.get("non_blocking"):
            target = kwargs.get("device") or args[0].device
            self.count += target.type != args[0].device.type
        return func(*args, **kwargs)


def _waits(loaded: tuple[BaseModelConfig, Any]) -> Iterator[WaitRow]:
    """Count per step, as the difference between a short run and a longer one; the same on any device."""
    config, pipeline = loaded
    schedulers = NoiseSchedulers(config, pipeline.scheduler, loaded_family(pipeline))
    own = pipeline.scheduler
    for name in schedulers.supported_names():
        yield WaitRow(name, _per_step(pipeline, schedulers.fresh(name)))
    pipeline.scheduler = own


def _per_step(pipeline: Any, scheduler: Any) -> float:
    counts: list[int] = []
    for steps in (EXTRA_STEPS, 2 * EXTRA_STEPS):
        pipeline.scheduler = copy.deepcopy(scheduler)
        generator = torch.Generator("cpu").manual_seed(0)  # as requests have
        with _Waits(pipeline.device) as waits:
            pipeline(
                PROMPTS[0], width=64, height=64, num_inference_steps=steps, output_type="latent", generator=generator
            )
        counts.append(waits.count)
    return (counts[1] - counts[0]) / EXTRA_STEPS
