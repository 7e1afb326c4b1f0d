"""The swap benchmark: diffusers' way and ours side by side, on one denoiser, in one run.

Owns the order of the measurements. Each repeat measures ours, then the baseline, from the same weights, so that what
else the machine does falls on both.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from serve_app.bench.machine.baseline import DiffusersBaseline
from serve_app.bench.machine.loraplex_swap import Fused, LoraplexSwap
from serve_app.bench.machine.lower_bounds import Touched, measure_floor
from serve_app.bench.machine.stream import ImageSteps
from serve_app.bench.machine.summary import summarise
from serve_app.bench.measuring.hardware import describe_machine
from serve_app.bench.measuring.memory import check_memory, peak_bytes, reset_peak
from serve_app.bench.measuring.options import Baseline, BenchmarkRefused, Device, SwapOptions
from serve_app.bench.measuring.report import Exactness, Memory, Sizes, SwapReport
from serve_app.bench.measuring.timing import Step, Stopwatch
from serve_app.bench.measuring.torch_setup import quiet, threads
from serve_app.bench.models.adapter_files import AdapterFiles, write_adapter_files
from serve_app.bench.models.denoisers import Denoiser, Outline, fill_outline, outline_of
from serve_app.engine.adapters.deltas import dtype_named


def run_swap(options: SwapOptions) -> SwapReport:
    """Run the benchmark.

    Raises:
        BenchmarkRefused: the device is absent, or the run would not fit in memory.
    """
    if options.device is Device.CUDA and not torch.cuda.is_available():
        raise BenchmarkRefused("--device cuda was asked for, but torch finds no CUDA device here; use --device cpu")
    with threads(options.threads), quiet(), TemporaryDirectory(prefix="loraplex-bench-") as folder:
        outline = outline_of(options)
        shapes = outline.targets(options.targets)
        sizes = _estimate(outline, shapes.values(), options)
        files = write_adapter_files(outline, options, Path(folder))
        return _SwapRun(options, sizes, tuple(shapes.values())).report(outline, files)


class _SwapRun:
    """One run. Invariant: between the measured blocks the base's own weights are bound and unchanged."""

    def __init__(self, options: SwapOptions, sizes: Sizes, shapes: tuple[torch.Size, ...]) -> None:
        self._options, self._sizes, self._shapes = options, sizes, shapes
        self._device = torch.device(options.device)
        self._machine = describe_machine(self._device, options.threads)
        self._stopwatch = Stopwatch[Step](self._device)
        self._unequal: list[str] = []
        self._compared = 0
        self._is_restored = True

    def report(self, outline: Outline, files: AdapterFiles) -> SwapReport:
        """Measure everything."""
        before = reset_peak(self._device)
        denoiser = fill_outline(outline, self._options)
        ours = LoraplexSwap(denoiser, files, self._options, self._stopwatch)
        ours.first(ours.admit())  # allocates the buffers
        peak = peak_bytes(self._device)
        baseline = DiffusersBaseline(denoiser) if self._options.baseline is Baseline.DIFFUSERS else None
        if baseline is not None:
            self._theirs(baseline, denoiser, files, [])  # imports and caches
        self._stopwatch.forget(but=Step.FIRST_SWAP)
        for round_number in range(1, self._options.repeats + 1):
            fused = ours.change(ours.admit(), round_number)
            self._is_restored &= not denoiser.changed(fused[0])
            if baseline is not None:
                self._theirs(baseline, denoiser, files, fused)
            del fused
        images = ImageSteps(denoiser, self._options)
        ours.stream(images, ours.admit())
        if baseline is not None:
            self._unfused(baseline, files, images)
            self._four_calls_stream(baseline, denoiser, files, images)
        fused_buffers = self._options.buffer_sets_held * self._sizes.touched_bytes
        expected = self._sizes.base_bytes + fused_buffers + 2 * ours.adapter_bytes
        memory = Memory(before, peak, peak_bytes(self._device), expected)
        return self._summary(images, memory)

    def _theirs(
        self, baseline: DiffusersBaseline, denoiser: Denoiser, files: AdapterFiles, fused: Sequence[Fused]
    ) -> None:
        """Load, fuse, unfuse and unload B; compare with ours; then give back the weights, which have drifted."""
        with self._stopwatch.timed(Step.LOAD):
            baseline.load(files.second)
        with self._stopwatch.timed(Step.FUSE):
            baseline.fuse()
        theirs = baseline.fused()
        for ours in fused:
            self._unequal += differing(theirs, ours)
            self._compared += len(ours)
        with self._stopwatch.timed(Step.UNFUSE):
            baseline.unfuse()
        with self._stopwatch.timed(Step.UNLOAD):
            baseline.unload()
        denoiser.refill(theirs)

    def _unfused(self, baseline: DiffusersBaseline, files: AdapterFiles, images: ImageSteps) -> None:
        """Change adapters without fusing, as diffusers can too: hotswap, and two resident; passes are slower for it."""
        baseline.load_as(files.first, "one")
        for path in [files.second, files.first] * self._options.repeats:
            with self._stopwatch.timed(Step.HOTSWAP):
                baseline.hotswap(path, "one")
        for path in _in_turn(files, self._options.repeats):
            with self._stopwatch.timed(Step.HOTSWAP_IMAGE):
                baseline.hotswap(path, "one")
                images.run()
        baseline.load_as(files.second, "other")
        for name in ["one", "other"] * self._options.repeats:
            with self._stopwatch.timed(Step.SET_ADAPTERS):
                baseline.activate(name)
        baseline.unload()

    def _four_calls_stream(
        self, baseline: DiffusersBaseline, denoiser: Denoiser, files: AdapterFiles, images: ImageSteps
    ) -> None:
        """Run images in turn, changing the adapter before each by the four calls; then give back the weights."""
        baseline.load(files.first)
        baseline.fuse()
        for path in _in_turn(files, self._options.repeats):
            with self._stopwatch.timed(Step.FOUR_CALLS_IMAGE):
                baseline.unfuse()
                baseline.unload()
                baseline.load(path)
                baseline.fuse()
                images.run()
        theirs = baseline.fused()
        baseline.unfuse()
        baseline.unload()
        denoiser.refill(theirs)

    def _summary(self, images: ImageSteps, memory: Memory) -> SwapReport:
        touched = Touched(self._shapes, self._options.rank)
        return summarise(
            self._options,
            self._machine,
            self._sizes,
            medians=self._stopwatch.medians(),
            floor=measure_floor(touched, self._sizes, self._device, dtype_named(self._options.dtype)),
            exactness=Exactness(
                fused_equal=not self._unequal if self._compared else None,
                weights_compared=self._compared,
                weights_unequal=tuple(self._unequal),
                base_restored=self._is_restored,
            ),
            images=images,
            memory=memory,
        )


def _in_turn(files: AdapterFiles, count: int) -> list[Path]:
    """Return the second adapter, the first, the second and so on."""
    return ([files.second, files.first] * count)[:count]


def differing(theirs: Fused, ours: Fused) -> list[str]:
    """Return the names of the weights that only one of the two changed, or that are not equal to the bit."""
    both = theirs.keys() & ours.keys()
    unequal = [name for name in both if not torch.equal(theirs[name], ours[name])]
    return sorted([*(theirs.keys() ^ ours.keys()), *unequal])


def _estimate(outline: Outline, shapes: Collection[torch.Size], options: SwapOptions) -> Sizes:
    """Work out what the run takes, and refuse it where that is not there."""
    itemsize = dtype_named(options.dtype).itemsize
    counts = [shape.numel() for shape in shapes]
    sizes = Sizes(
        source=outline.architecture.source,
        parameters=outline.parameters,
        base_bytes=outline.parameters * itemsize,
        touched=len(counts),
        touched_bytes=sum(counts) * itemsize,
        factor_bytes=sum(options.rank * (shape[0] + shape[1:].numel()) * itemsize for shape in shapes),
    )
    check_memory(
        options,
        base_bytes=sizes.base_bytes,
        touched_bytes=sizes.touched_bytes,
        factor_bytes=sizes.factor_bytes,
        largest_weight=max(counts),
    )
    return sizes
