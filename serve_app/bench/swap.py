"""The swap benchmark: diffusers' way and ours side by side, on one denoiser, in one run.

Owns the order of the measurements. Each repeat measures ours, then the baseline, from the same weights, so that what
else the machine does falls on both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers.utils import logging
from torch import Tensor

from serve_app.bench.adapter_files import AdapterFiles, write_adapter_files
from serve_app.bench.baseline import DiffusersBaseline
from serve_app.bench.denoisers import Denoiser, Outline, fill_outline, outline_of
from serve_app.bench.floors import Touched, measure_floor
from serve_app.bench.machine import describe_machine
from serve_app.bench.memory import check_memory, peak_bytes, reset_peak
from serve_app.bench.options import Baseline, BenchmarkRefused, Device, SwapOptions
from serve_app.bench.report import Exactness, Memory, Sizes, SwapReport
from serve_app.bench.residence import on_device
from serve_app.bench.stream import ImageSteps
from serve_app.bench.summary import summarise
from serve_app.bench.timing import Step, Stopwatch
from serve_app.config import AdapterLimits
from serve_app.engine.adapter import ParsedAdapter, dtype_named
from serve_app.engine.canonical import read_canonical, write_canonical
from serve_app.engine.manifest import manifest_of
from serve_app.engine.reader import read_adapter
from serve_app.engine.weights import AdapterWeights

NAME = "benchmark"


def run_swap(options: SwapOptions) -> SwapReport:
    """Run the benchmark.

    Raises:
        BenchmarkRefused: the device is absent, or the run would not fit in memory.
    """
    if options.device is Device.CUDA and not torch.cuda.is_available():
        raise BenchmarkRefused("--device cuda was asked for, but torch finds no CUDA device here; use --device cpu")
    with _threads(options.threads), _quiet(), TemporaryDirectory(prefix="loraplex-bench-") as folder:
        return _SwapRun(options, Path(folder)).report()


class _SwapRun:
    """One run. Invariant: before and after each measured block, the base's own weights are bound and unchanged."""

    def __init__(self, options: SwapOptions, folder: Path) -> None:
        self._options, self._folder = options, folder
        self._device, self._dtype = torch.device(options.device), dtype_named(options.dtype)
        self._machine = describe_machine(self._device, options.threads)
        self._stopwatch = Stopwatch(self._device)
        outline = outline_of(options)
        self._shapes = outline.targets(options.targets)
        self._sizes = self._estimate(outline)
        self._files: AdapterFiles = write_adapter_files(outline, options, folder)
        self._before_bytes = reset_peak(self._device)
        self._denoiser: Denoiser = fill_outline(outline, options)
        self._parameters = dict(self._denoiser.module.named_parameters())
        self._touched = [f"{name}.weight" for name in self._shapes]
        self._manifest = manifest_of(self._denoiser.pipeline)
        component = self._denoiser.architecture.component
        self._weights = AdapterWeights({component: self._denoiser.module})
        self._unequal: list[str] = []
        self._compared = 0
        self._is_restored = True

    def report(self) -> SwapReport:
        """Measure everything."""
        first, second = self._admit_both()
        self._ours(first, second)  # allocates the twins
        peak = peak_bytes(self._device)
        baseline = DiffusersBaseline(self._denoiser) if self._options.baseline is Baseline.DIFFUSERS else None
        if baseline is not None:
            self._theirs(baseline)  # imports and caches
        self._stopwatch.forget()
        for _ in range(self._options.repeats):
            self._admit_both()
            fused = self._ours(first, second)
            if baseline is not None:
                self._theirs(baseline, fused)
        images = ImageSteps(self._denoiser, self._options)
        self._stream(images, first, second)
        touched = Touched(tuple(self._shapes.values()), self._options.rank)
        return summarise(
            self._options,
            self._machine,
            self._sizes,
            medians=self._stopwatch.medians(),
            floor=measure_floor(touched, self._sizes, self._device, self._dtype),
            exactness=self._exactness(),
            images=images,
            memory=Memory(
                before_bytes=self._before_bytes,
                peak_bytes=peak,
                end_peak_bytes=peak_bytes(self._device),
                expected_bytes=self._sizes.base_bytes + self._sizes.touched_bytes + 2 * first.size_bytes,
            ),
        )

    def _exactness(self) -> Exactness:
        return Exactness(
            fused_equal=not self._unequal if self._compared else None,
            weights_compared=self._compared,
            weights_unequal=tuple(self._unequal),
            base_restored=self._is_restored,
        )

    def _estimate(self, outline: Outline) -> Sizes:
        itemsize, rank = self._dtype.itemsize, self._options.rank
        counts = [shape.numel() for shape in self._shapes.values()]
        factor_bytes = sum(rank * (shape[0] + shape[1:].numel()) * itemsize for shape in self._shapes.values())
        sizes = Sizes(
            source=outline.architecture.source,
            parameters=outline.parameters,
            base_bytes=outline.parameters * itemsize,
            touched=len(counts),
            touched_bytes=sum(counts) * itemsize,
            factor_bytes=factor_bytes,
        )
        check_memory(
            self._options,
            base_bytes=sizes.base_bytes,
            touched_bytes=sizes.touched_bytes,
            factor_bytes=factor_bytes,
            largest_weight=max(counts),
        )
        return sizes

    def _admit_both(self) -> tuple[ParsedAdapter, ParsedAdapter]:
        """Take the first file through every stage, timed; the second one by the same way, untimed."""
        canonical = self._folder / "first.canonical"
        with self._stopwatch.timed(Step.READ):
            adapter = self._read(self._files.first)
        with self._stopwatch.timed(Step.WRITE_CANONICAL):
            write_canonical(adapter, canonical)
        with self._stopwatch.timed(Step.READ_CANONICAL):
            first = self._read_canonical(canonical)
        if self._files.kohya is not None:
            with self._stopwatch.timed(Step.READ_KOHYA):
                self._read(self._files.kohya)
        other = self._folder / "second.canonical"
        if not other.exists():
            write_canonical(self._read(self._files.second), other)
        return first, self._read_canonical(other)

    def _read(self, path: Path) -> ParsedAdapter:
        return read_adapter(path, NAME, self._manifest, AdapterLimits())

    def _read_canonical(self, path: Path) -> ParsedAdapter:
        return read_canonical(path, pinned=self._device.type == "cuda")

    def _ours(self, first: ParsedAdapter, second: ParsedAdapter) -> dict[str, Tensor]:
        """Base -> first -> second -> base; return the second one's fused weights by name, left in their twins."""
        with self._stopwatch.timed(Step.APPLY):
            self._weights.apply([(first, 1.0)])
        with self._stopwatch.timed(Step.SWAP):
            self._weights.apply([(second, 1.0)])
        if self._device.type == "cuda":
            self._resident(first, second)
        fused = {name: parameter.data for name, parameter in self._parameters.items()}
        with self._stopwatch.timed(Step.RESTORE):
            self._weights.apply([])
        changed = {name for name, data in fused.items() if data.data_ptr() != self._parameters[name].data_ptr()}
        assert changed == set(self._touched)
        self._is_restored &= not self._denoiser.changed(self._touched)
        return {name: fused[name] for name in self._touched}

    def _resident(self, first: ParsedAdapter, second: ParsedAdapter) -> None:
        """The same swap with the factors on the device already."""
        with self._stopwatch.timed(Step.TO_DEVICE):
            there = on_device(second, self._device)
        self._weights.apply([(first, 1.0)])
        with self._stopwatch.timed(Step.SWAP_RESIDENT):
            self._weights.apply([(there, 1.0)])

    def _theirs(self, baseline: DiffusersBaseline, fused: dict[str, Tensor] | None = None) -> None:
        """Load, fuse, unfuse and unload the second adapter; then give back the weights, which have drifted."""
        with self._stopwatch.timed(Step.LOAD):
            baseline.load(self._files.second)
        with self._stopwatch.timed(Step.FUSE):
            baseline.fuse()
        if fused is not None:
            self._compare(baseline, fused)
        with self._stopwatch.timed(Step.UNFUSE):
            baseline.unfuse()
        with self._stopwatch.timed(Step.UNLOAD):
            baseline.unload()
        self._denoiser.refill(self._touched)

    def _compare(self, baseline: DiffusersBaseline, fused: dict[str, Tensor]) -> None:
        """Compare our fused weights, in their twins, with diffusers', in the base's own memory."""
        only_one = {f"{layer}.weight" for layer in baseline.fused_layers()} ^ set(fused)
        unequal = [name for name, ours in fused.items() if not torch.equal(ours, self._parameters[name].data)]
        self._unequal += sorted(only_one) + unequal
        self._compared += len(fused)

    def _stream(self, images: ImageSteps, first: ParsedAdapter, second: ParsedAdapter) -> None:
        """Alternate an image that keeps its adapter with one that brings another."""
        self._weights.apply([(first, 1.0)])
        images.run()
        applied, other = first, second
        for _ in range(self._options.repeats):
            with self._stopwatch.timed(Step.STEADY_IMAGE):
                self._weights.apply([(applied, 1.0)])
                images.run()
            with self._stopwatch.timed(Step.CHANGING_IMAGE):
                self._weights.apply([(other, 1.0)])
                images.run()
            applied, other = other, applied
        self._weights.apply([])


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep diffusers from warning that the pipeline has no text encoders, which it does at every load."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Give torch this many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
