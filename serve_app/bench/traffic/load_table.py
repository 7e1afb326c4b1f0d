"""A load report as tables for a terminal."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from serve_app.bench.traffic.load_report import LoadReport

SHOWN_ADAPTERS = 10


def render_load(report: LoadReport) -> Table:
    """Return the figures of the whole run."""
    table = Table(box=None, pad_edge=False, show_header=False)
    stages = ", ".join(f"{stage} {mean_ms:.1f}" for stage, mean_ms in report.mean_ms.items())
    rows = (
        ("requests", f"{report.requests}, of which {report.answered} were answered with an image"),
        ("offered", f"{report.offered_per_s:.2f} a second; answered {report.answered_per_s:.2f} a second"),
        ("latency", f"p50 {report.p50_s:.3f} s, p95 {report.p95_s:.3f} s, p99 {report.p99_s:.3f} s"),
        ("worst", f"{report.worst_s:.3f} s"),
        ("swaps, fetches", f"{report.swaps:.2f}, {report.fetches:.2f} a request"),
        ("mean, ms", stages),
        ("fairness", f"{report.fairness:.2f} over {len(report.adapters)} adapters; 1 is even"),
        ("errors", ", ".join(f"{code} {count}" for code, count in report.errors.items()) or "none"),
        ("client late", f"{report.late_s * 1000:.0f} ms at most"),
    )
    for name, value in rows:
        table.add_row(Text(name, style="dim"), Text(value))
    return table


def render_adapters(report: LoadReport) -> Table:
    """Return the adapters that were asked for most."""
    table = Table(box=None, pad_edge=False)
    table.add_column("adapter")
    for name in ("requests", "answered", "mean s", "p95 s"):
        table.add_column(name, justify="right")
    for one in report.adapters[:SHOWN_ADAPTERS]:
        counts = (str(one.requests), str(one.answered))
        table.add_row(Text(one.name), *counts, f"{one.mean_s:.3f}", f"{one.p95_s:.3f}")
    return table
