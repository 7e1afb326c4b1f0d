"""The `loraplex` command.

Owns which commands there are, and those about a Serve file. Must stay light, as must all that it imports at the top:
code that needs torch or Ray is imported inside a command.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from serve_app.cli import bench, key
from serve_app.cli.bases.commands import bases
from serve_app.cli.generate import generate
from serve_app.cli.inspect import inspect
from serve_app.cli.models import models
from serve_app.cli.pull import pull
from serve_app.cli.terminal import (
    FAILED,
    AsJson,
    CommandFailed,
    OptionalServeFile,
    ServeFile,
    err,
    out,
    plain,
    print_json,
    reporting,
)
from serve_app.demo.embedded import embedded_serve_file

if TYPE_CHECKING:
    from serve_app.autoscaling.sharing import LongestWait
    from serve_app.cli.serve_file import ServeFileReport

STARTER = Path(__file__).with_name("loraplex.yaml")

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
    """Serve LoRA adapters over diffusion base models, and generate images with them."""


@app.command(rich_help_panel="The service")
def check(
    config: ServeFile,
    gpus: Annotated[int | None, typer.Option(min=0, help="The GPUs of the cluster, to compare with.")] = None,
    as_json: AsJson = False,
) -> None:
    """Validate a whole Serve file strictly; Serve itself ignores unknown keys silently."""
    report = _valid(config, as_json=as_json)
    least, most = report.gpus
    if gpus is not None and least > gpus:
        fault = f"the fewest replicas of all bases need {least} GPUs, and there are {gpus}: lower min_replicas"
        with reporting(as_json=as_json):
            raise CommandFailed(f"{config}: {fault}", "too_few_gpus")
    if as_json:
        bases = [base.id for application in report.applications for base in application.bases]
        needed: dict[str, Any] = {"fewest_replicas": least, "most_replicas": most}
        if gpus is not None:
            wait = report.longest_wait(gpus)
            needed["longest_wait"] = None if wait is None else {"starts": wait.starts, "drains": wait.drains}
        print_json({"valid": True, "url": report.url, "bases": bases, "gpus": needed})
        return
    out.print(f"{config}: valid; " + ", ".join(report.summary), soft_wrap=True)
    if most:
        text = f"GPUs: {least} for the fewest replicas of all bases, {most} for the most"
        short = f"; with {gpus} {_turns(report.longest_wait(gpus))}" if gpus and most > gpus else ""
        out.print(text + short, soft_wrap=True)


def _turns(wait: LongestWait | None) -> str:
    """Return what it means that bases want more GPUs than there are."""
    if wait is None:
        return "those with `min_replicas: 0` never get one, as the guaranteed replicas have all: lower min_replicas"
    if not wait.drains:
        return "some bases have fewer replicas than they could use when all are busy"
    return (
        f"bases take turns when all are busy: one without a replica waits for at most {wait.starts:g} starts, and "
        f"{wait.drains} times for others to finish what they accepted"
    )


@app.command(rich_help_panel="The service")
def serve(
    config: OptionalServeFile = None,
    address: Annotated[
        str,
        typer.Option(help="The Ray cluster to join ('auto': the one on this machine); default: start one."),
    ] = "local",
    ready_timeout_s: Annotated[float, typer.Option(help="Give up when not ready after this long.")] = 600.0,
    as_json: AsJson = False,
) -> None:
    """Run a Serve file, wait until it is ready, say what to try; Ctrl-C stops everything.

    Without a file it serves the embedded demo bases.
    """
    is_demo = config is None
    config = config or embedded_serve_file()
    report = _valid(config, as_json=as_json)
    from serve_app.cli.launch import ServeProcess, StartFailed

    def say_ready() -> None:
        if as_json:
            print_json({"ready": True, "url": report.url})
        else:
            out.print(report.what_to_try, soft_wrap=True)
            if is_demo:
                out.print(f"  these are the demo bases; `loraplex init {STARTER.name}` begins a file of your own")

    with reporting(as_json=as_json):
        process = ServeProcess(config, url=report.url, address=address, is_log_on_stderr=as_json)
        try:
            process.run(ready_timeout_s=ready_timeout_s, on_ready=say_ready)
        except StartFailed as error:
            raise CommandFailed(str(error), "start_failed") from None


@app.command(rich_help_panel="The service")
def init(
    config: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write it.")] = Path(STARTER.name),
) -> None:
    """Write a commented Serve file for SDXL on one GPU, to begin with; an existing file is never overwritten."""
    with reporting(as_json=False):
        try:
            with config.open("x") as file:
                file.write(STARTER.read_text())
        except FileExistsError:
            raise CommandFailed(f"{config} exists already; name another file", "file_exists") from None
        except OSError as error:
            raise CommandFailed(f"{config} cannot be written: {error.strerror}", "not_written") from None
    out.print(f"{config} written; edit it, then: loraplex check {config} && loraplex serve {config}", soft_wrap=True)


def _valid(config: Path, *, as_json: bool) -> ServeFileReport:
    """Return the contents of a valid file; the errors of an invalid one are printed, and end the command."""
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
app.add_typer(bases, name="bases", rich_help_panel="The service")
app.add_typer(key.app, name="key", rich_help_panel="The service")
app.add_typer(bench.app, name="bench", rich_help_panel="The service")


def main() -> None:
    """Run the command line."""
    app()
