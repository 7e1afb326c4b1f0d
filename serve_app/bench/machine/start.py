"""The start benchmark: loading a denoiser as a replica does against reading its file's bytes, in one run.

Owns the folder that is loaded, shaped like a Hub repository, and the order of the measurements. The file is in the
page cache throughout, so that this measures the cost of loading over a disk as fast as memory.
"""

from __future__ import annotations

import gc
import os
import shutil
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from serve_app.bench.measuring.hardware import describe_machine
from serve_app.bench.measuring.memory import OVERHEAD_BYTES, check_room, free_bytes
from serve_app.bench.measuring.options import StartOptions
from serve_app.bench.measuring.report import Machine, Row, StartReport
from serve_app.bench.measuring.timing import Stopwatch, Timing, median_of
from serve_app.bench.measuring.torch_setup import quiet, threads
from serve_app.bench.models.denoisers import Outline, fill_outline, outline_of
from serve_app.config import BaseModelConfig
from serve_app.engine.adapters.deltas import bytes_of, dtype_named
from serve_app.engine.base.fetching import HubAccess, ResolvedSource
from serve_app.engine.base.loading import load_base
from serve_app.engine.weights.fused import FusedWeights
from serve_app.engine.weights.integrity import IntegrityChecker
from serve_app.settings import ModelSource

CPU = torch.device("cpu")
READ_BYTES = 8 * 1024**2
PAGE_BYTES = 4096


class StartStep(StrEnum):
    """Everything that is timed."""

    READ = "file.read"
    LOAD_BASE = "loraplex.load_base"
    TOUCH = "loraplex.touch"
    CHECKSUMS = "loraplex.checksums"


def run_start(options: StartOptions) -> StartReport:
    """Run the benchmark.

    Raises:
        BenchmarkRefused: the run would not fit in memory or on the disk.
    """
    with threads(options.threads), quiet(), TemporaryDirectory(prefix="loraplex-bench-") as folder:
        outline = outline_of(options.as_swap())
        base_bytes = outline.parameters * dtype_named(options.dtype).itemsize
        # The file in the page cache, and beside it one denoiser.
        check_room(f"{options.model} in {options.dtype}", 2 * base_bytes + OVERHEAD_BYTES, free_bytes(CPU), "memory")
        check_room(f"{options.model} in {options.dtype}", base_bytes, shutil.disk_usage(folder).free, "disk")
        machine = describe_machine(CPU, options.threads)
        return _StartRun(options, outline, Path(folder)).report(machine)


class _StartRun:
    """One run; at no time is there more than one denoiser in memory."""

    def __init__(self, options: StartOptions, outline: Outline, folder: Path) -> None:
        self._options, self._folder = options, folder
        self._architecture, self._parameters = outline.architecture, outline.parameters
        self._stopwatch = Stopwatch[StartStep](CPU)
        denoiser = fill_outline(outline, options.as_swap())
        # The index that makes the folder a base for `load_base`; it weighs nothing.
        vae = AutoencoderKL(block_out_channels=(32,), latent_channels=4)
        denoiser.pipeline.register_modules(vae=vae)
        denoiser.pipeline.save_pretrained(folder, max_shard_size="1TB")
        [self._file] = (folder / self._architecture.component).glob("*.safetensors")
        with self._file.open("rb") as written:
            os.fsync(written.fileno())  # not while it is measured

    def report(self, machine: Machine) -> StartReport:
        """Measure everything; a first round, which imports and fills the page cache, counts random values instead."""
        with _Drawn() as loading:
            self._round()
        self._stopwatch.forget()
        gc.freeze()  # what was imported, as a replica does
        for _ in range(self._options.repeats):
            self._round()
        gc.unfreeze()
        medians = self._stopwatch.medians()
        load, touch = (self._stopwatch.timings(step) for step in (StartStep.LOAD_BASE, StartStep.TOUCH))
        rounds = [
            (loaded + touched, read)
            for loaded, touched, read in zip(load, touch, self._stopwatch.timings(StartStep.READ), strict=True)
        ]
        return StartReport(
            command=self._options.command(),
            date=datetime.now(UTC).date().isoformat(),
            options=self._options,
            machine=machine,
            source=self._architecture.source,
            parameters=self._parameters,
            file_bytes=self._file.stat().st_size,
            rows=tuple(_row(step, timing) for step, timing in medians.items()),
            ready=_row("loraplex.ready", median_of([ready for ready, _ in rounds])),
            ready_over_read_wall=median(ready.wall_ms / read.wall_ms for ready, read in rounds),
            ready_over_read_cpu=median(ready.cpu_ms / read.cpu_ms for ready, read in rounds),
            drawn_by_load=loading.values,
        )

    def _round(self) -> None:
        with self._stopwatch.timed(StartStep.READ):
            _read(self._file)
        with self._stopwatch.timed(StartStep.LOAD_BASE):
            pipeline = self._load_base()
        with self._stopwatch.timed(StartStep.TOUCH):
            _touch(getattr(pipeline, self._architecture.component))
        del pipeline
        gc.collect()  # modules lie in cycles
        pipeline = self._load_base()  # with no page touched, as a replica has it
        with self._stopwatch.timed(StartStep.CHECKSUMS):
            component = self._architecture.component
            weights = FusedWeights({component: getattr(pipeline, component)})
            IntegrityChecker(weights.checksummed_tensors)
        del pipeline, weights
        gc.collect()

    def _load_base(self) -> Any:
        source = ModelSource(folder=self._folder)
        config = BaseModelConfig(id="benchmark", source=source, dtype=self._options.dtype.value)
        return load_base(config, ResolvedSource(folder=self._folder), {}, device=CPU, hub=HubAccess()).pipeline


class _Drawn(TorchDispatchMode):
    """Counts the random values that are drawn into memory; those for torch's meta device are none."""

    def __init__(self) -> None:
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outcome = func(*args, **(kwargs or {}))
        is_random = torch.Tag.nondeterministic_seeded in func.tags
        if is_random and isinstance(outcome, torch.Tensor) and outcome.device.type != "meta":
            self.values += outcome.numel()
        return outcome


def _read(path: Path) -> None:
    view = bytes_of(torch.empty(READ_BYTES, dtype=torch.uint8))
    with path.open("rb", buffering=0) as file:
        while file.readinto(view):
            pass


def _touch(module: nn.Module) -> None:
    """Look at a byte of every page: weights that are mapped, not read, are not there before."""
    for parameter in module.parameters():
        parameter.detach().view(-1).view(torch.uint8)[::PAGE_BYTES].sum()


def _row(step: str, timing: Timing) -> Row:
    return Row(str(step), timing.wall_ms, timing.cpu_ms, timing.device_ms)
