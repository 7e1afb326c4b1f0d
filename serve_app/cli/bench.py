"""`loraplex bench`: benchmarks of this machine; those of a service are in `serve_app.cli.traffic`.

Owns arguments and what is printed. Torch is imported by the commands alone, so that other commands start at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Protocol

import typer
from rich.console import RenderableType

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
from serve_app.cli import traffic
from serve_app.cli.terminal import out, print_line, reporting

JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the report there.", dir_okay=False)]


class Reported(Protocol):
    """The result of a benchmark."""

    @property
    def command(self) -> str:
        """The command line that repeats the run."""
        ...

    def to_json(self) -> str:
        """Return the whole report."""
        ...


app = typer.Typer(no_args_is_help=True, help="Measure this machine, simulate a service, load one.")


@app.command()
def swap(
    model: Annotated[Model, typer.Option(help="Which denoiser to build, from its public configuration.")] = Model.TINY,
    device: Annotated[Device, typer.Option(help="Where to build it.")] = Device.CPU,
    dtype: Annotated[DType, typer.Option(help="The dtype of its weights.")] = DType.BFLOAT16,
    rank: Annotated[int, typer.Option(min=1, max=512, help="The adapters' rank.")] = 32,
    targets: Annotated[Targets, typer.Option(help="Which layers the adapters change.")] = Targets.ATTENTION,
    baseline: Annotated[Baseline, typer.Option(help="What to measure beside our way.")] = Baseline.DIFFUSERS,
    narrow: Annotated[bool, typer.Option("--narrow", help="The full module tree with small layers.")] = False,
    prepare: Annotated[bool, typer.Option(help="Measure prepared swaps too; takes more memory.")] = True,
    repeat: Annotated[int, typer.Option(min=1, help="Repeats of each step; medians are shown.")] = 3,
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="Torch's threads on the CPU.")] = 1,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoiser steps of an image of the stream.")] = None,
    latent: Annotated[int | None, typer.Option(min=8, help="Height and width of its latents; even.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Compare swaps with diffusers' and our way on random weights; nothing is downloaded."""
    from serve_app.bench.machine.swap import run_swap
    from serve_app.bench.measuring.table import render

    options = SwapOptions(
        model, device, dtype, rank, targets, baseline, narrow, prepare, repeat, seed, threads, steps, latent
    )
    with reporting(as_json=False):
        report = run_swap(options)
    _show(report, render(report), json_file)


@app.command()
def start(
    model: Annotated[Model, typer.Option(help="Which denoiser to load, full size.")] = Model.TINY,
    dtype: Annotated[DType, typer.Option(help="The dtype of its weights.")] = DType.BFLOAT16,
    repeat: Annotated[int, typer.Option(min=1, help="Repeats of each step; medians are shown.")] = 3,
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="Torch's threads.")] = 1,
    json_file: JsonFile = None,
) -> None:
    """Compare loading a base with reading its file; random weights are written to the temporary folder once."""
    from serve_app.bench.machine.start import run_start
    from serve_app.bench.measuring.table import render_start

    with reporting(as_json=False):
        report = run_start(StartOptions(model, dtype, repeat, seed, threads))
    _show(report, render_start(report), json_file)


@app.command()
def pipeline(
    device: Annotated[Device, typer.Option(help="Where to run.")] = Device.CPU,
    dtype: Annotated[DType, typer.Option(help="The dtype of all parts.")] = DType.FLOAT32,
    size: Annotated[int, typer.Option(min=64, help="Side of the demo bases' images; a multiple of 64.")] = 128,
    steps: Annotated[int, typer.Option(min=1, help="Denoiser steps of an image.")] = 4,
    repeat: Annotated[int, typer.Option(min=1, help="Pairs of each choice; medians are shown.")] = 5,
    seed: Annotated[int, typer.Option(help="Seed of the images and of the random weights.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="Torch's threads.")] = 1,
    json_file: JsonFile = None,
) -> None:
    """Compare the options of a pipeline's set-up in turn, on the demo bases and a narrow SDXL."""
    from serve_app.bench.machine.pipeline import run_pipeline
    from serve_app.bench.measuring.table import render_pipeline

    with reporting(as_json=False):
        report = run_pipeline(PipelineOptions(device, dtype, size, steps, repeat, seed, threads))
    _show(report, render_pipeline(report), json_file)


@app.command()
def admission(
    model: Annotated[Model, typer.Option(help="Which denoiser the adapters are for, full size.")] = Model.TINY,
    dtype: Annotated[DType, typer.Option(help="The dtype of its weights.")] = DType.BFLOAT16,
    rank: Annotated[int, typer.Option(min=1, max=512, help="The adapters' rank.")] = 32,
    repeat: Annotated[int, typer.Option(min=1, help="Repeats of each file; rounds of alone and beside.")] = 15,
    steps: Annotated[int, typer.Option(min=1, help="Denoiser steps of the generation in each window.")] = 20,
    latent: Annotated[int, typer.Option(min=8, help="Height and width of its latents; even.")] = 32,
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
    json_file: JsonFile = None,
) -> None:
    """Measure the admission of new files, alone and during a running generation."""
    from serve_app.bench.machine.admission import run_admission
    from serve_app.bench.measuring.table import render_admission

    with reporting(as_json=False):
        report = run_admission(AdmissionOptions(model, dtype, rank, repeat, steps, latent, seed))
    _show(report, render_admission(report), json_file)


def _show(report: Reported, table: RenderableType, json_file: Path | None) -> None:
    """Print how to repeat a run and its results, and write them to a file if requested."""
    print_line(f"$ {report.command}")
    out.print(table)
    if json_file is not None:
        json_file.write_text(report.to_json())


app.command()(traffic.workload)
app.command()(traffic.simulate)
app.command(no_args_is_help=True)(traffic.load)
