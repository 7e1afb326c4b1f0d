"""`make gpu`: the tests and benchmarks that want a GPU, in one run, held against `bars`, in one report.

Owns the order, the time limit and the report. A part that fails is told of and the next one runs. Without a GPU the
same parts run narrow, which shows that every line works. Imports no web framework and no Ray: such machines may have
torch and little else.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch

from serve_app.bench.machine.bars import BARS, Bar
from serve_app.bench.measuring.hardware import describe_machine, driver_version
from serve_app.bench.measuring.options import (
    AdmissionOptions,
    Baseline,
    Device,
    DType,
    Model,
    PipelineOptions,
    StartOptions,
    SwapOptions,
    Targets,
)
from serve_app.bench.measuring.report import Machine, SwapReport
from serve_app.bench.measuring.timing import Step

Figures = dict[str, float]
ROOT = Path(__file__).parents[3]
TESTS_LIMIT_S = 240


@dataclass(frozen=True, slots=True)
class Verdict:
    """How one bar came out; `value` None means that it was not run."""

    bar: Bar
    value: float | None
    outcome: str


@dataclass(frozen=True, slots=True)
class Part:
    """The result of one part, or why it has none."""

    name: str
    seconds: float
    figures: Mapping[str, float]
    commands: tuple[str, ...] = ()
    error: str | None = None


@dataclass(frozen=True, slots=True)
class GpuReport:
    """One run of the kit."""

    date: str
    command: str
    machine: Machine
    driver: str | None
    parts: tuple[Part, ...]
    verdicts: tuple[Verdict, ...]

    def to_json(self) -> str:
        """Return everything."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    def to_markdown(self) -> str:
        """Return the bars and figures as tables."""
        machine = self.machine
        versions = ", ".join(f"{name} {found}" for name, found in machine.versions.items())
        rows = [
            f"| {one.bar.part} | {one.bar.figure} | {one.bar.comparison} {one.bar.limit:g} | "
            f"{'' if one.value is None else f'{one.value:.4g}'} | {one.outcome} |"
            for one in self.verdicts
        ]
        lines = [
            "# GPU report",
            "",
            f"`{self.command}`, {self.date}. Device: {machine.accelerator or 'none, narrow on the CPU'}; "
            f"driver: {self.driver or 'none'}; {machine.processor}, {machine.cores} cores, {machine.memory_gb} GB, "
            f"load {machine.load_average}; {machine.system}; {versions}.",
            "",
            "| part | figure | bar | found | outcome |",
            "|---|---|---|---|---|",
            *rows,
        ]
        for part in self.parts:
            lines += ["", f"## {part.name} ({part.seconds:.0f} s)", ""]
            lines += [f"    {command}" for command in part.commands]
            lines += ["", f"Failed: {part.error}"] if part.error else []
            lines += ["", *[f"- {name}: {value:.4g}" for name, value in part.figures.items()]]
        return "\n".join(lines) + "\n"


@dataclass(slots=True)
class Kit:
    """The parts, for a device; full size on a GPU, narrow on a CPU."""

    device: Device
    commands: list[str] = field(default_factory=list[str])

    @property
    def is_on_gpu(self) -> bool:
        """Whether full sizes run."""
        return self.device is Device.CUDA

    def parts(self) -> dict[str, Callable[[], Figures]]:
        """Return what runs, by name, in order."""
        return {
            "tests": self.tests,
            "swap sdxl": lambda: self.swap(Model.SDXL),
            "swap sd15": lambda: self.swap(Model.SD15),
            "swap flux": lambda: self.swap(Model.FLUX),
            "pipeline": self.pipeline,
            "admission": self.admission,
            "start": self.start,
        }

    def tests(self) -> Figures:
        """Run tests/gpu in a process of its own, without this project's other test set-up."""
        words = ["-m", "pytest", "-q", "-x", "-c", "/dev/null", "--noconftest", "-p", "no:cacheprovider", "tests/gpu"]
        self.commands.append(" ".join(["python", *words]))
        done = subprocess.run([sys.executable, *words, f"--rootdir={ROOT}"], cwd=ROOT, timeout=TESTS_LIMIT_S)
        return {"exit status": float(done.returncode)}

    def swap(self, model: Model) -> Figures:
        """Run `bench swap` of every linear layer, by diffusers and by ours."""
        from serve_app.bench.machine.swap import run_swap

        options = SwapOptions(
            model, self.device, DType.BFLOAT16, 64 if self.is_on_gpu else 4, Targets.LINEAR, Baseline.DIFFUSERS,
            is_narrow=not self.is_on_gpu, is_preparing=self._has_room(model), repeats=5 if self.is_on_gpu else 1,
            steps=None if self.is_on_gpu else 1,
        )  # fmt: skip
        self.commands.append(options.command())
        return _swap_figures(run_swap(options))

    def _has_room(self, model: Model) -> bool:
        """Whether two sets of fused buffers fit: for FLUX that takes 76 GB."""
        if model is not Model.FLUX or not self.is_on_gpu:
            return True
        return torch.cuda.mem_get_info()[0] > 80 * 10**9

    def pipeline(self) -> Figures:
        """Run `bench pipeline`."""
        from serve_app.bench.machine.pipeline import run_pipeline

        size, steps = (512, 8) if self.is_on_gpu else (64, 1)
        sides = (512, 1024) if self.is_on_gpu else (64,)
        dtype = DType.BFLOAT16 if self.is_on_gpu else DType.FLOAT32
        options = PipelineOptions(self.device, dtype, size, steps, repeats=3 if self.is_on_gpu else 1, vae_sides=sides)
        self.commands.append(options.command())
        report = run_pipeline(options)
        figures = {f"{row.subject}, {row.choice}: {row.other} over {row.usual}": row.ratio for row in report.rows}
        waits = {row.scheduler: row.waits_per_step for row in report.waits}
        return {"most waits of the host in a step": max(waits.values(), default=0.0)} | waits | figures

    def admission(self) -> Figures:
        """Run `bench admission`."""
        from serve_app.bench.machine.admission import run_admission

        model, repeats, steps = (Model.SDXL, 5, 10) if self.is_on_gpu else (Model.TINY, 1, 1)
        options = AdmissionOptions(model, repeats=repeats, steps=steps)
        self.commands.append(options.command())
        report = run_admission(options)
        ready = {f"{row.spelling}, ready, ms": row.ready_wall_ms for row in report.rows}
        slowest = max(row.ready_wall_ms for row in report.rows)
        return {"a new file ready in host memory, ms": slowest, "slowdown beside": report.beside.slowdown} | ready

    def start(self) -> Figures:
        """Run `bench start`."""
        from serve_app.bench.machine.start import run_start

        options = StartOptions(Model.SDXL if self.is_on_gpu else Model.TINY, repeats=3 if self.is_on_gpu else 1)
        self.commands.append(options.command())
        report = run_start(options)
        return {"load and touch over reading the file": report.ready_over_read_wall} | {
            f"{row.step}, ms": row.wall_ms for row in report.rows
        }


def _swap_figures(report: SwapReport) -> Figures:
    rows = {row.step: row for row in report.rows}
    figures = {
        "fused weights with other bits than diffusers'": float(len(report.exactness.weights_unequal)),
        "base restored": float(report.exactness.base_restored),
        "swap from host memory, ms": rows[Step.SWAP].wall_ms,
        "a swap's calls alone, ms": rows[Step.CALLS].cpu_ms,
        "swap over the floor": report.ratios.swap_over_floor_wall,
        "floor, ms": report.floor.swap_ms,
        "stream with changes, of one without": report.stream.changing.of_steady,
    }
    if Step.BIND in rows:
        figures["prepared swap on the critical path, ms"] = rows[Step.BIND].wall_ms
    stream = report.stream
    for way, rate in (("prepared changes", stream.prepared), ("hotswap", stream.hotswap),
                      ("the four calls", stream.four_calls)):  # fmt: skip
        if rate is not None:
            figures[f"stream with {way}, of one without"] = rate.of_steady
    if report.ratios.diffusers_over_swap_wall is not None:
        figures["diffusers' four calls over a swap"] = report.ratios.diffusers_over_swap_wall
    return figures | {f"{row.step}, ms": row.wall_ms for row in report.rows}


def run_kit(chosen: Sequence[str], *, limit_s: float, device: Device) -> GpuReport:
    """Run the parts, or the chosen ones, until the limit; the rest is not run."""
    kit, began, parts = Kit(device), time.monotonic(), list[Part]()
    machine = describe_machine(torch.device(device), 1)
    for name, act in kit.parts().items():
        if chosen and name not in chosen:
            continue
        parts.append(_run(kit, name, act, is_late=time.monotonic() - began > limit_s))
        sys.stderr.write(f"{name}: {parts[-1].error or 'done'} after {parts[-1].seconds:.0f} s\n")
    found = {part.name: part for part in parts}
    command = " ".join(["make gpu", *([f'GPU="{" ".join(f"--part {name!r}" for name in chosen)}"'] if chosen else [])])
    verdicts = tuple(_verdict(bar, found.get(bar.part), is_on_gpu=kit.is_on_gpu) for bar in BARS)
    date = datetime.now(UTC).date().isoformat()
    return GpuReport(date, command, machine, driver_version(), tuple(parts), verdicts)


def _run(kit: Kit, name: str, act: Callable[[], Figures], *, is_late: bool) -> Part:
    if is_late:
        return Part(name, 0.0, {}, error="no time was left")
    began = time.monotonic()
    figures, error = Figures(), None
    kit.commands.clear()
    try:
        figures = act()
    except Exception as failure:  # noqa: BLE001 - told of in the report, and the other parts still run
        error = f"{type(failure).__name__}: {failure}".partition("\n")[0]
    if kit.is_on_gpu:
        torch.cuda.empty_cache()
    return Part(name, time.monotonic() - began, figures, tuple(kit.commands), error)


def _verdict(bar: Bar, part: Part | None, *, is_on_gpu: bool) -> Verdict:
    value = None if part is None else part.figures.get(bar.figure)
    if value is None:
        return Verdict(bar, None, "not run" if part is None or part.error is None else f"not run: {part.error}")
    if bar.needs_gpu and not is_on_gpu:
        return Verdict(bar, value, "not held against the bar: no GPU")
    return Verdict(bar, value, "met" if bar.holds(value) else "missed")


def main() -> int:
    """Run the kit; 1 where a bar was missed or a part failed."""
    parser = argparse.ArgumentParser(prog="make gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--part", action="append", default=[], choices=list(Kit(Device.CPU).parts()))
    parser.add_argument("--out", type=Path, help="writes OUT.md and OUT.json")
    parser.add_argument("--limit", type=float, default=540.0, help="no part begins after so many seconds")
    parser.add_argument("--device", type=Device, choices=list(Device), help="without it, a GPU where there is one")
    asked = parser.parse_args()
    device = asked.device or (Device.CUDA if torch.cuda.is_available() else Device.CPU)
    report = run_kit(asked.part, limit_s=asked.limit, device=device)
    sys.stdout.write(report.to_markdown())
    if asked.out is not None:
        asked.out.with_suffix(".md").write_text(report.to_markdown())
        asked.out.with_suffix(".json").write_text(report.to_json())
    is_good = all(part.error is None for part in report.parts)
    return 0 if is_good and all(verdict.outcome != "missed" for verdict in report.verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
