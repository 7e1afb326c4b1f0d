"""The start benchmark: loading a denoiser against reading its file's bytes, in one run.

Owns the folder that is loaded, shaped like a Hub repository, and the order of the measurements. The file is in the
page cache throughout, so that this measures the cost of loading over a disk as fast as memory.
"""

from __future__ import annotations

import gc
import shutil
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from serve_app.bench.measuring.hardware import describe_machine
from serve_app.bench.measuring.memory import OVERHEAD_BYTES, check_room, free_bytes
from serve_app.bench.measuring.options import StartOptions
from serve_app.bench.measuring.report import Machine, Row, StartReport
from serve_app.bench.measuring.timing import Stopwatch, Timing
from serve_app.bench.measuring.torch_setup import quiet, threads
from serve_app.bench.models.denoisers import Outline, fill_outline, outline_of
from serve_app.config import BaseModelConfig
from serve_app.engine.adapters.deltas import bytes_of, dtype_named
from serve_app.engine.base.fetching import HubAccess, ResolvedSource
from serve_app.engine.base.loading import load_base
from serve_app.settings import ModelSource

CPU = torch.device("cpu")
READ_BYTES = 8 * 1024**2
PAGE_BYTES = 4096


class StartStep(StrEnum):
    """Everything that is timed."""

    READ = "file.read"
    READ_WHOLE = "file.read_to_new_memory"
    LOAD = "loraplex.from_pretrained"
    TOUCH = "loraplex.touch"
    LOAD_BASE = "loraplex.load_base"
    CONSTRUCT = "torch.construct"


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
        self._dtype = dtype_named(options.dtype)
        self._stopwatch = Stopwatch[StartStep](CPU)
        denoiser = fill_outline(outline, options.as_swap())
        # The index that makes the folder a base for `load_base`; it weighs nothing.
        vae = AutoencoderKL(block_out_channels=(32,), latent_channels=4)
        denoiser.pipeline.register_modules(vae=vae)
        denoiser.pipeline.save_pretrained(folder, max_shard_size="1TB")
        [self._file] = (folder / self._architecture.component).glob("*.safetensors")

    def report(self, machine: Machine) -> StartReport:
        """Measure everything; a first round, which imports and fills the page cache, counts random values instead."""
        with _Drawn() as loading:
            self._round()
        self._stopwatch.forget()
        for _ in range(self._options.repeats):
            self._round()
        with _Drawn() as constructing:
            self._construct()
        medians = self._stopwatch.medians()
        read, ready = medians[StartStep.READ], medians[StartStep.LOAD] + medians[StartStep.TOUCH]
        return StartReport(
            command=self._options.command(),
            date=datetime.now(UTC).date().isoformat(),
            options=self._options,
            machine=machine,
            source=self._architecture.source,
            parameters=self._parameters,
            file_bytes=self._file.stat().st_size,
            rows=tuple(_row(step, timing) for step, timing in medians.items()),
            ready=_row("loraplex.ready", ready),
            ready_over_read_wall=ready.wall_ms / read.wall_ms,
            ready_over_read_cpu=ready.cpu_ms / read.cpu_ms,
            drawn_by_load=loading.values,
            drawn_by_constructing=constructing.values,
        )

    def _round(self) -> None:
        with self._stopwatch.timed(StartStep.READ):
            _read(self._file, torch.empty(READ_BYTES, dtype=torch.uint8))
        with self._stopwatch.timed(StartStep.READ_WHOLE):
            _read(self._file, torch.empty(self._file.stat().st_size, dtype=torch.uint8))
        with self._stopwatch.timed(StartStep.LOAD):
            pipeline = self._load()
        with self._stopwatch.timed(StartStep.TOUCH):
            _touch(getattr(pipeline, self._architecture.component))
        del pipeline
        gc.collect()  # modules lie in cycles
        with self._stopwatch.timed(StartStep.LOAD_BASE):
            self._load_base()
        gc.collect()

    def _load(self) -> Any:
        """Load as `load_base` does, without what it does afterwards."""
        return DiffusionPipeline.from_pretrained(
            self._folder, dtype=self._dtype, use_safetensors=True, local_files_only=True
        )

    def _load_base(self) -> None:
        source = ModelSource(folder=self._folder)
        config = BaseModelConfig(id="benchmark", source=source, dtype=self._options.dtype.value)
        load_base(config, ResolvedSource(folder=self._folder), {}, device=CPU, hub=HubAccess())

    def _construct(self) -> None:
        """Build the module as its class does by itself: every weight is initialised, to be overwritten by a load."""
        model_class = getattr(diffusers, self._architecture.denoiser)
        before = torch.get_default_dtype()
        torch.set_default_dtype(self._dtype)
        try:
            with self._stopwatch.timed(StartStep.CONSTRUCT):
                model_class(**self._architecture.configuration(is_narrow=False))
        finally:
            torch.set_default_dtype(before)


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


def _read(path: Path, buffer: torch.Tensor) -> None:
    """Read a whole file through a buffer, from its start again where the file is longer."""
    view = bytes_of(buffer)
    with path.open("rb", buffering=0) as file:
        filled = 0
        while count := file.readinto(view[filled : filled + READ_BYTES]):
            filled = (filled + count) % len(view)


def _touch(module: nn.Module) -> None:
    """Look at a byte of every page: weights that are mapped, not read, are not there before."""
    for parameter in module.parameters():
        parameter.detach().view(-1).view(torch.uint8)[::PAGE_BYTES].sum()


def _row(step: str, timing: Timing) -> Row:
    return Row(str(step), timing.wall_ms, timing.cpu_ms, timing.device_ms)
