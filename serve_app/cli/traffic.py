"""`loraplex bench workload`, `simulate` and `load`: generate traffic, simulate it, or send it to a service.

Owns arguments and what is printed.
"""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from serve_app.cli.terminal import Key, checked_url, err, out, print_line, reporting

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from serve_app.bench.simulation.profile import Profile
    from serve_app.bench.simulation.simulator import Fleet
    from serve_app.bench.traffic.workload import Workload

TrafficName = Annotated[str, typer.Option("--traffic", help="Which traffic to draw: day, or blog.")]
Requests = Annotated[int | None, typer.Option("--requests", min=1, help="How many requests; users grow with them.")]
Adapters = Annotated[int | None, typer.Option("--adapters", min=1, help="How many adapters there are.")]
Replay = Annotated[
    Path | None,
    typer.Option("--csv", exists=True, dir_okay=False, help="Replay this file; docs/capacity.md has the columns."),
]
JsonFile = Annotated[Path | None, typer.Option("--json", dir_okay=False, help="Write everything there.")]
PlotFile = Annotated[Path | None, typer.Option("--plot", dir_okay=False, help="Write a PNG there.")]


def workload(
    traffic: TrafficName = "day",
    requests: Requests = None,
    adapters: Adapters = None,
    seed: Annotated[int, typer.Option(help="Seed of the drawing.")] = 0,
    csv_file: Replay = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", dir_okay=False, help="Write the requests there as CSV.")
    ] = None,
) -> None:
    """Generate traffic from a seed, and compare it with that of real services."""
    from serve_app.bench.simulation.table import render_statistics
    from serve_app.bench.traffic.workload import generate, named_traffic
    from serve_app.bench.traffic.workload_csv import read_workload, write_workload
    from serve_app.bench.traffic.workload_statistics import calibration, statistics_of

    with reporting(as_json=False):
        parameters = named_traffic(traffic, requests=requests, adapters=adapters)
        drawn = read_workload(csv_file) if csv_file is not None else generate(parameters, seed)
        out.print(render_statistics(statistics_of(drawn)))
        if csv_file is None and traffic == "day" and requests is None and adapters is None:
            print_line("\nagainst published traces, over the days in a row and laid over one another:")
            out.print(render_statistics(calibration(parameters, seed)))
        if output is not None:
            with output.open("w", newline="", encoding="utf-8") as file:
                write_workload(drawn, file)


def simulate(
    traffic: TrafficName = "day",
    requests: Requests = None,
    adapters: Adapters = None,
    csv_file: Replay = None,
    profile: Annotated[
        str, typer.Option(help="The kind of machine: calibrated, a10g, a100, h100, or one of --timings.")
    ] = "calibrated",
    timings: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="A file of your own measurements.")
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="Repeatable; all by default, for --p95 loraplex. loraplex, loraplex-whole, loraplex-unspread, "
            "least-loaded, least-loaded-late, ray-multiplexed, consistent-hash, affinity, blog."
        ),
    ] = None,
    replicas: Annotated[int, typer.Option(min=1, help="Replicas of each base, one GPU each.")] = 3,
    p95: Annotated[
        float | None, typer.Option(min=0.001, help="Find the fewest GPUs for this p95 in seconds instead.")
    ] = None,
    autoscale: Annotated[
        float | None, typer.Option(min=0.001, help="Scale each base to this target wait in seconds.")
    ] = None,
    max_replicas: Annotated[int, typer.Option(min=1, help="With --autoscale: the most of each base.")] = 20,
    max_ongoing: Annotated[int, typer.Option(min=1, help="Without --p95: what a replica takes on at a time.")] = 16,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, from 0; a CSV's requests stay the same.")] = 3,
    noise: Annotated[float, typer.Option(min=0, max=2, help="Spread of true times around predicted ones.")] = 0.0,
    json_file: JsonFile = None,
    plot_file: PlotFile = None,
) -> None:
    """Simulate traffic on any number of GPUs, with the service's own decisions."""
    from serve_app.bench.simulation import compare as comparison
    from serve_app.bench.simulation.plot import check_plotting, plot_simulated
    from serve_app.bench.simulation.profile import read_profile
    from serve_app.bench.simulation.table import render_comparison, render_plan

    with reporting(as_json=False):
        check_plotting(plot_file)
        machine = read_profile(profile, timings)
        chosen = comparison.policies_named(policy or (["loraplex"] if p95 is not None else []))
        command = _command()
        with _status() as say:
            workloads = _workloads(traffic, requests, adapters, csv_file, seeds, say)
            if p95 is not None:
                found = comparison.plan(workloads, machine, chosen, p95, noise=noise, command=command, say=say)
            else:
                fleets = _fleets(workloads, machine, replicas, autoscale, max_replicas, max_ongoing)
                found = comparison.compare(workloads, machine, chosen, fleets, noise=noise, command=command, say=say)
        print_line(f"$ {command}")
        print_line(f"profile {machine.name}: {machine.about}; not measured: {', '.join(machine.unproved) or 'nothing'}")
        if isinstance(found, comparison.Plan):
            out.print(render_plan(found))
        else:
            out.print(render_comparison(found))
        if json_file is not None:
            json_file.write_text(found.to_json())
        if plot_file is not None:
            plot_simulated(found, plot_file)


def load(
    url: Annotated[str, typer.Argument(callback=checked_url, help="Where the service answers.")],
    rate: Annotated[float, typer.Option(min=0.001, help="Requests a second, offered whether answered or not.")] = 1.0,
    duration: Annotated[float, typer.Option(min=0.1, help="Offer requests for so many seconds.")] = 60.0,
    max_requests: Annotated[int, typer.Option(min=1, help="And at most so many.")] = 1000,
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", help="Repeatable, the most popular first; by default all that the service knows."),
    ] = None,
    csv_file: Replay = None,
    speed: Annotated[float, typer.Option(min=0.001, help="With --csv: how much faster than it was.")] = 1.0,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of each request; default: the base's own.")] = None,
    size: Annotated[int | None, typer.Option(min=8, help="Width and height; default: the base's own.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the traffic.")] = 0,
    timeout: Annotated[float, typer.Option(min=0.1, help="Give a request up after so many seconds.")] = 120.0,
    key: Key = None,
    json_file: JsonFile = None,
    plot_file: PlotFile = None,
) -> None:
    """Send traffic to a live service at a fixed rate, and measure the replies."""
    from serve_app.bench.simulation.plot import check_plotting, plot_points
    from serve_app.bench.traffic.load import LoadOptions, run_load
    from serve_app.bench.traffic.load_table import render_adapters, render_load

    options = LoadOptions(
        url, rate, duration, max_requests, tuple(adapter or ()), csv_file, speed, steps, size, seed, timeout, key
    )
    with reporting(as_json=False):
        check_plotting(plot_file)
        with _progress() as on_progress:
            report = run_load(options, command=_command(), on_progress=on_progress)
        out.print(render_load(report))
        out.print(render_adapters(report))
        if json_file is not None:
            json_file.write_text(report.to_json())
        if plot_file is not None:
            plot_points(plot_file, f"{report.offered_per_s:.2f} requests a second", report.points())
        if not report.answered:
            raise typer.Exit(1)


def _workloads(
    traffic: str, requests: int | None, adapters: int | None, csv_file: Path | None, seeds: int, say: Callable
) -> Sequence[Workload]:
    from serve_app.bench.traffic.workload import generate, named_traffic
    from serve_app.bench.traffic.workload_csv import read_workload

    if csv_file is not None:
        return [read_workload(csv_file)] * seeds
    parameters = named_traffic(traffic, requests=requests, adapters=adapters)
    say("drawing the traffic")
    return [generate(parameters, seed) for seed in range(seeds)]


def _fleets(
    workloads: Sequence[Workload],
    machine: Profile,
    replicas: int,
    autoscale: float | None,
    max_replicas: int,
    max_ongoing: int,
) -> dict[str, Fleet]:
    from serve_app.autoscaling.desired import ScalingRule
    from serve_app.bench.simulation.simulator import Fleet

    fleets: dict[str, Fleet] = {}
    for base_id in {base for workload in workloads for base in workload.bases}:
        rule = None
        if autoscale is not None:
            start_s = machine.base(base_id).start_s
            rule = ScalingRule(autoscale, start_s, max_replicas=max(max_replicas, replicas))
        fleets[base_id] = Fleet(replicas, rule, max_ongoing=max_ongoing)
    return fleets


def _command() -> str:
    """Return the command line as it was given, without a key."""
    words = list(sys.argv[1:])
    for place, word in enumerate(words):
        if word == "--key" and place + 1 < len(words):
            words[place + 1] = "..."
        elif word.startswith("--key="):
            words[place] = "--key=..."
    return shlex.join(["loraplex", *words])


@contextlib.contextmanager
def _status() -> Iterator[Callable[[str], None]]:
    """Show the present activity on a terminal."""
    with err.status("") as status:
        yield lambda text: status.update(text)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[float, str], None]]:
    """Show the progress of a run on a terminal."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=err) as progress:
        task = progress.add_task("", total=1.0)
        yield lambda share, text: progress.update(task, completed=share, description=text)
