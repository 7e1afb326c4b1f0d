"""The admission benchmark: a file never seen, from the disk to host memory, and what that costs a generation beside.

Owns the order of the measurements. Files go the way that a replica sends them: a warm child process checks them and
writes the canonical form, this process reads that. Alone and beside take turns in short windows, so that what else the
machine does falls on both.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory
from typing import Self

import psutil
import torch

from serve_app.bench.machine.stream import ImageSteps
from serve_app.bench.measuring.hardware import describe_machine
from serve_app.bench.measuring.options import AdmissionOptions
from serve_app.bench.measuring.report import AdmissionReport, AdmissionRow, InterferenceReport
from serve_app.bench.measuring.torch_setup import quiet, threads
from serve_app.bench.models.adapter_files import AdapterFiles, write_adapter_files
from serve_app.bench.models.denoisers import fill_outline, outline_of, pipeline_of
from serve_app.engine.adapters.canonical import read_canonical
from serve_app.engine.admission.process import AdmissionProcess
from serve_app.engine.base.manifest import manifest_of
from serve_app.settings import AdapterLimits

CPU = torch.device("cpu")


def run_admission(options: AdmissionOptions) -> AdmissionReport:
    """Run the benchmark, with torch on one thread in both processes."""
    with threads(1), quiet(), TemporaryDirectory(prefix="loraplex-bench-") as folder:
        outline = outline_of(options.as_swap())
        files = write_adapter_files(outline, options.as_swap(), Path(folder))
        machine = describe_machine(CPU, 1)
        manifest = manifest_of(pipeline_of(outline.architecture, outline.module))
        child = AdmissionProcess(manifest, AdapterLimits())
        try:
            rows, beside = asyncio.run(_measure(options, files, child))
        finally:
            child.close()
        return AdmissionReport(
            command=options.command(),
            date=datetime.now(UTC).date().isoformat(),
            options=options,
            machine=machine,
            source=outline.architecture.source,
            layers=len(outline.targets(options.as_swap().targets)),
            rows=rows,
            beside=beside,
            load_after=round(os.getloadavg()[0], 2),
        )


@dataclass(slots=True)
class _Times:
    """Milliseconds of each admission of one file."""

    admit: list[float] = field(default_factory=list[float])
    child: list[float] = field(default_factory=list[float])
    read: list[float] = field(default_factory=list[float])
    read_cpu: list[float] = field(default_factory=list[float])

    def row(self, spelling: str, file_bytes: int) -> AdmissionRow:
        child_ms, read_cpu_ms = fmean(self.child), median(self.read_cpu)
        ready = [admit + read for admit, read in zip(self.admit, self.read, strict=True)]
        return AdmissionRow(
            spelling=spelling,
            file_bytes=file_bytes,
            admit_wall_ms=median(self.admit),
            child_cpu_ms=child_ms,
            read_wall_ms=median(self.read),
            read_cpu_ms=read_cpu_ms,
            ready_wall_ms=median(ready),
            ready_cpu_ms=child_ms + read_cpu_ms,
        )


async def _measure(
    options: AdmissionOptions, files: AdapterFiles, child: AdmissionProcess
) -> tuple[tuple[AdmissionRow, ...], InterferenceReport]:
    paths = {"diffusers": files.first} | ({"kohya": files.kohya} if files.kohya is not None else {})
    times = {spelling: _Times() for spelling in paths}
    for path in paths.values():  # the child's imports and first memory
        await _admit(path, child, _Times())
    for _ in range(options.repeats):
        for spelling, path in paths.items():
            await _admit(path, child, times[spelling])
    rows = tuple(times[spelling].row(spelling, path.stat().st_size) for spelling, path in paths.items())
    beside = await asyncio.to_thread(_beside, options, files.second, child)
    return rows, beside


async def _admit(path: Path, child: AdmissionProcess, times: _Times) -> None:
    """Take one file to host memory; remove what was written, so that the next file is new again."""
    canonical = path.with_suffix(".canonical")
    child_before, began = _child_ms(child), time.perf_counter()
    await child.admit(path, "benchmark", canonical)
    times.admit.append((time.perf_counter() - began) * 1e3)
    times.child.append(_child_ms(child) - child_before)
    began, cpu_began = time.perf_counter(), time.process_time()
    read_canonical(canonical)
    times.read_cpu.append((time.process_time() - cpu_began) * 1e3)
    times.read.append((time.perf_counter() - began) * 1e3)
    canonical.unlink()


def _child_ms(child: AdmissionProcess) -> float:
    """Return the child's processor time so far; the system counts it in hundredths of a second."""
    if child.pid is None:
        return 0.0  # it has not started yet
    used = psutil.Process(child.pid).cpu_times()
    return (used.user + used.system) * 1e3


def _beside(options: AdmissionOptions, path: Path, child: AdmissionProcess) -> InterferenceReport:
    """Run the same steps alone, beside admissions, and beside a process that only counts, in turn."""
    torch.set_num_threads(1)  # torch counts them for each thread
    images = ImageSteps(fill_outline(outline_of(options.running()), options.running()), options.running())
    _step(images, options.steps)  # caches
    rounds: list[tuple[_StepTime, _StepTime, _StepTime]] = []
    admitted = 0
    for _ in range(options.repeats):
        alone = _step(images, options.steps)
        with _Admitting(path, child) as admitting:
            beside = _step(images, options.steps)
        with _counting(child):
            busy = _step(images, options.steps)
        rounds.append((alone, beside, busy))
        admitted += admitting.count
    slowdowns = tuple(beside.wall_ms / alone.wall_ms for alone, beside, _ in rounds)
    return InterferenceReport(
        steps=options.steps,
        alone_ms=median(alone.wall_ms for alone, _, _ in rounds),
        beside_ms=median(beside.wall_ms for _, beside, _ in rounds),
        slowdowns=slowdowns,
        slowdown=median(slowdowns),
        slowdown_cpu=median(beside.cpu_ms / alone.cpu_ms for alone, beside, _ in rounds),
        slowdown_busy=median(busy.wall_ms / alone.wall_ms for alone, _, busy in rounds),
        slowdown_busy_cpu=median(busy.cpu_ms / alone.cpu_ms for alone, _, busy in rounds),
        admitted=admitted,
    )


@contextmanager
def _counting(child: AdmissionProcess) -> Iterator[None]:
    """Keep a process busy that touches no memory, as nice as the child: the cost of any second busy core here."""
    niceness = psutil.Process(child.pid).nice() if child.pid is not None else 0
    program = f"import os; os.nice({niceness} - os.nice(0)); print(flush=True)\nwhile True: pass"
    process = subprocess.Popen([sys.executable, "-S", "-c", program], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()  # it has begun
        yield
    finally:
        process.kill()
        process.wait()


class _Admitting:
    """Admits one file again and again, in a thread of its own, for as long as the block runs; `count` is how often."""

    def __init__(self, path: Path, child: AdmissionProcess) -> None:
        self._path, self._child = path, child
        self._is_over, self._has_begun = threading.Event(), threading.Event()
        self._thread = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))
        self.count = 0

    def __enter__(self) -> Self:
        self._work = self._thread.submit(lambda: asyncio.run(self._run()))
        self._has_begun.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.shutdown()
        self._work.result()

    async def _run(self) -> None:
        self._has_begun.set()
        while True:  # at least once, however late this thread has its turn
            await _admit(self._path, self._child, _Times())
            self.count += 1
            if self._is_over.is_set():
                return


@dataclass(frozen=True, slots=True)
class _StepTime:
    """A step's median, on the wall and of this thread's processor time: waiting for a core is in the first alone."""

    wall_ms: float
    cpu_ms: float


def _step(images: ImageSteps, steps: int) -> _StepTime:
    """Return the median times of a step: one image of one step each."""
    wall: list[float] = []
    cpu: list[float] = []
    for _ in range(steps):
        began, cpu_began = time.perf_counter(), time.thread_time()
        images.run()
        cpu.append((time.thread_time() - cpu_began) * 1e3)
        wall.append((time.perf_counter() - began) * 1e3)
    return _StepTime(median(wall), median(cpu))
