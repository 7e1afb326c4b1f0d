"""The `loraplex` command.

Owns arguments, exit codes and what a person reads in the terminal; the work is done elsewhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from serve_app.cli import bench
from serve_app.cli.launch import ServeProcess, StartFailed
from serve_app.cli.serve_file import ServeFileInvalid, check_serve_file

app = typer.Typer(
    name="loraplex",
    no_args_is_help=True,
    help="Serve LoRA adapters over diffusion base models.",
    add_completion=True,
)
app.add_typer(bench.app, name="bench")
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

ConfigFile = Annotated[Path, typer.Argument(help="A Serve config file.", exists=True, dir_okay=False)]


@app.callback()
def root() -> None:
    """Keep the commands apart even while there are few."""


@app.command()
def check(config: ConfigFile) -> None:
    """Validate a whole Serve file strictly; Serve itself ignores unknown keys silently."""
    try:
        report = check_serve_file(config)
    except ServeFileInvalid as error:
        for fault in error.faults:
            err.print(f"[red]{config}[/]: {fault}", soft_wrap=True)
        raise typer.Exit(1) from None
    out.print(f"{config}: valid; " + ", ".join(report.summary), soft_wrap=True)


@app.command()
def serve(
    config: ConfigFile,
    address: Annotated[
        str,
        typer.Option(help="The Ray cluster to join ('auto': the one on this machine); default: start one."),
    ] = "local",
    ready_timeout_s: Annotated[float, typer.Option(help="Give up when not ready after this long.")] = 600.0,
) -> None:
    """Run a Serve file, wait until it is ready, say what to try; Ctrl-C stops everything."""
    try:
        report = check_serve_file(config)
    except ServeFileInvalid as error:
        for fault in error.faults:
            err.print(f"[red]{config}[/]: {fault}", soft_wrap=True)
        raise typer.Exit(1) from None
    process = ServeProcess(config, url=report.url, address=address)
    try:
        process.run(ready_timeout_s=ready_timeout_s, on_ready=lambda: out.print(report.what_to_try, soft_wrap=True))
    except StartFailed as error:
        err.print(f"[red]loraplex[/]: {error}", soft_wrap=True)
        raise typer.Exit(1) from None


def main() -> None:
    """Run the command line."""
    app()
