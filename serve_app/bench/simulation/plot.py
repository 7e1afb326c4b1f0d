"""Pictures of what was simulated or measured.

Owns what is drawn. Matplotlib comes with the `bench` extra alone, and is imported when a picture is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve_app.bench.simulation.compare import Comparison, Plan
from serve_app.errors import LoraplexError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

QUANTILES = (("p50_s", "p50", "#9ecae1"), ("p95_s", "p95", "#3182bd"), ("p99_s", "p99", "#08306b"))


class PlottingAbsent(LoraplexError):
    """A picture was asked for where nothing draws one."""

    needed_for: str
    code = "plotting_absent"
    template = "{needed_for} needs matplotlib; install the extra: pip install 'loraplex[bench]'"


def new_figure(columns: int, *, needed_for: str = "--plot") -> tuple[Figure, list[Axes]]:
    """Return an empty picture of some plots side by side.

    Raises:
        PlottingAbsent: the `bench` extra is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise PlottingAbsent(needed_for) from None
    figure = Figure(figsize=(6.4 * columns, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(1, columns, squeeze=False)
    return figure, list(axes[0])


def check_plotting(path: Path | None) -> None:
    """Fail before a long run, not after it.

    Raises:
        PlottingAbsent: a picture is asked for and the `bench` extra is not installed.
    """
    if path is not None:
        new_figure(1)


def plot_simulated(found: Comparison | Plan, path: Path) -> None:
    """Draw the result that the simulator was asked for."""
    if isinstance(found, Plan):
        plot_plan(found, path)
    else:
        plot_comparison(found, path)


def plot_comparison(comparison: Comparison, path: Path) -> None:
    """Draw each policy's latencies with their spread over seeds, and its fetches."""
    figure, (latency, fetches) = new_figure(2)
    names = [result.policy for result in comparison.results]
    for offset, (name, label, colour) in enumerate(QUANTILES):
        spreads = [result.spread(name) for result in comparison.results]
        places = [row + (offset - 1) * 0.26 for row in range(len(names))]
        errors = [[s.mean - s.least for s in spreads], [s.most - s.mean for s in spreads]]
        latency.barh(places, [s.mean for s in spreads], 0.26, xerr=errors, label=label, color=colour)
    latency.set(xlabel="seconds from request to answer; bars: least and most of the seeds")
    latency.legend()
    spreads = [result.spread("fetches") for result in comparison.results]
    fetches.barh(range(len(names)), [s.mean for s in spreads], color="#3182bd")
    fetches.set(xlabel="fetches a request")
    for axes in (latency, fetches):
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
    figure.suptitle(f"profile {comparison.profile}")
    figure.savefig(path, dpi=120)


def plot_plan(found: Plan, path: Path) -> None:
    """Draw p95 by the number of replicas, base by base, with the target."""
    bases = sorted({need.base_id for need in found.needs})
    figure, plots = new_figure(len(bases))
    for base_id, axes in zip(bases, plots, strict=True):
        for need in (need for need in found.needs if need.base_id == base_id):
            counts = [count for count, _ in need.curve]
            worst = [max(values) for _, values in need.curve]
            axes.plot(counts, worst, marker="o", label=need.policy)
        axes.axhline(found.p95_s, color="black", linestyle=":", label=f"target, {found.p95_s:g} s")
        axes.set(xlabel="replicas, one GPU each", ylabel="p95, worst seed, s", yscale="log", title=base_id)
        axes.legend()
    figure.suptitle(f"profile {found.profile}")
    figure.savefig(path, dpi=120)


def plot_points(path: Path, title: str, series: Sequence[tuple[str, Sequence[float], Sequence[float]]]) -> None:
    """Draw points over time: named series of seconds since the start and seconds taken."""
    figure, (axes,) = new_figure(1)
    for name, at_s, took_s in series:
        axes.plot(at_s, took_s, ".", label=f"{name}: {len(at_s)}")
    axes.set(xlabel="sent, seconds since the start", ylabel="seconds to the answer", title=title)
    axes.set_ylim(bottom=0)
    if any(len(at_s) for _, at_s, _ in series):
        axes.legend()
    figure.savefig(path, dpi=120)
