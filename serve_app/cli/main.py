"""The `loraplex` command.

Owns which commands there are, and those about a Serve file. Must stay light, as must all that it imports at the top:
whatever needs torch or Ray is imported inside a command.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from serve_app.cli import bench, key
from serve_app.cli.generate import generate
from serve_app.cli.inspect import inspect
from serve_app.cli.models import models
from serve_app.cli.pull import pull
from serve_app.cli.terminal import FAILED, AsJson, CommandFailed, ServeFile, err, out, plain, print_json, reporting

if TYPE_CHECKING:
    from pathlib import Path

    from serve_app.cli.serve_file import ServeFileReport

app = typer.Typer(
    name="loraplex",
    no_args_is_help=True,
    help="Serve LoRA adapters over diffusion base models, and draw with them.",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_show_locals=False,
)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"loraplex {version('loraplex')}")
        raise typer.Exit


@app.callback()
def root(
    is_version_asked: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Serve LoRA adapters over diffusion base models, and draw with them."""


@app.command(rich_help_panel="The service")
def check(config: ServeFile, as_json: AsJson = False) -> None:
    """Validate a whole Serve file strictly; Serve itself ignores unknown keys silently."""
    report = _valid(config, as_json=as_json)
    if as_json:
        bases = [base.id for application in report.applications for base in application.bases]
        print_json({"valid": True, "url": report.url, "bases": bases})
    else:
        out.print(f"{config}: valid; " + ", ".join(report.summary), soft_wrap=True)


@app.command(rich_help_panel="The service")
def serve(
    config: ServeFile,
    address: Annotated[
        str,
        typer.Option(help="The Ray cluster to join ('auto': the one on this machine); default: start one."),
    ] = "local",
    ready_timeout_s: Annotated[float, typer.Option(help="Give up when not ready after this long.")] = 600.0,
    as_json: AsJson = False,
) -> None:
    """Run a Serve file, wait until it is ready, say what to try; Ctrl-C stops everything."""
    report = _valid(config, as_json=as_json)
    from serve_app.cli.launch import ServeProcess, StartFailed

    def say_ready() -> None:
        if as_json:
            print_json({"ready": True, "url": report.url})
        else:
            out.print(report.what_to_try, soft_wrap=True)

    with reporting(as_json=as_json):
        process = ServeProcess(config, url=report.url, address=address, is_log_on_stderr=as_json)
        try:
            process.run(ready_timeout_s=ready_timeout_s, on_ready=say_ready)
        except StartFailed as error:
            raise CommandFailed(str(error), "start_failed") from None


def _valid(config: Path, *, as_json: bool) -> ServeFileReport:
    """Return what a valid file says; every fault of another is printed, and ends the command."""
    from serve_app.cli.serve_file import ServeFileInvalid, check_serve_file

    try:
        return check_serve_file(config)
    except ServeFileInvalid as error:
        if as_json:
            print_json({"valid": False, "faults": error.faults})
        else:
            for fault in error.faults:
                err.print(Text.assemble((str(config), "red"), f": {plain(fault)}"), soft_wrap=True)
        raise typer.Exit(FAILED) from None


app.command(rich_help_panel="Drawing")(models)
app.command(rich_help_panel="Drawing", no_args_is_help=True)(generate)
app.command(rich_help_panel="Adapters", no_args_is_help=True)(inspect)
app.command(rich_help_panel="Adapters", no_args_is_help=True)(pull)
app.add_typer(key.app, name="key", rich_help_panel="The service")
app.add_typer(bench.app, name="bench", rich_help_panel="The service")


def main() -> None:
    """Run the command line."""
    app()
