"""Results of the simulator and the generator, as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from serve_app.bench.simulation.compare import Comparison, Plan, PolicyResult
from serve_app.bench.traffic.workload_statistics import Statistic


def render_statistics(found: Sequence[Statistic]) -> Table:
    """Return statistics beside their targets."""
    table = Table("", "here", "published", "", box=None, pad_edge=False)
    for column in (1, 2):
        table.columns[column].justify = "right"
    for one in found:
        target = "" if one.target is None else f"{one.target:g}"
        verdict = {True: "within", False: "OUTSIDE", None: ""}[one.is_met]
        table.add_row(one.name, f"{one.value:.4g}", target, f"{verdict} {one.tolerance:.0%}" if verdict else "")
    return table


def render_comparison(comparison: Comparison) -> Table:
    """Return a row for each policy: means over seeds, with the least and most of p95, and the largest slowdown.

    "1 p95" is of the requests for the fewest images, "8 p99" of those for the most.
    """
    table = _table("policy")
    for name in (
        "p50 s",
        "p95 s (seeds)",
        "p99 s",
        "/first",
        "1 p95",
        "8 p99",
        "slow",
        "fetch",
        "swap",
        "busy",
        "GPU h",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for result in comparison.results:
        table.add_row(result.policy, *_cells(result))
    return table


def _table(first: str) -> Table:
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    table.add_column(first, no_wrap=True)
    return table


def _cells(result: PolicyResult) -> list[str]:
    p95 = result.spread("p95_s")
    ratio = sum(result.p95_over_first) / len(result.p95_over_first)
    return [
        f"{result.spread('p50_s').mean:.2f}",
        f"{p95.mean:.2f} ({p95.least:.2f}-{p95.most:.2f})",
        f"{result.spread('p99_s').mean:.2f}",
        f"{ratio:.2f}",
        f"{result.spread('fewest_p95_s').mean:.1f}",
        f"{result.spread('most_p99_s').mean:.1f}",
        f"{result.spread('slowdown').most:.1f}",
        f"{result.spread('fetches').mean:.3f}",
        f"{result.spread('swaps').mean:.3f}",
        f"{result.spread('busy').mean:.0%}",
        f"{result.spread('replica_hours').mean:.1f}",
    ]


def render_plan(found: Plan) -> Table:
    """Return how many replicas each base needs under each policy."""
    table = _table("policy")
    table.add_column("base")
    for name in ("GPUs", "p95 s, worst seed", "with one fewer", "busy"):
        table.add_column(name, justify="right")
    for need in found.needs:
        worst = {count: max(values) for count, values in need.curve}
        if need.replicas is None:
            least = min(worst.values())
            table.add_row(need.policy, need.base_id, "none", f"{least:.2f} at best", "", "")
            continue
        fewer = worst.get(need.replicas - 1)
        table.add_row(
            need.policy,
            need.base_id,
            str(need.replicas),
            f"{worst[need.replicas]:.2f}",
            "" if fewer is None else f"{fewer:.2f}",
            f"{need.busy or 0.0:.0%}",
        )
    return table
