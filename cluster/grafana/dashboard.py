"""The Grafana dashboard, as code: `python -m cluster.grafana.dashboard` writes `dashboards/loraplex.json`.

Owns which panels there are and in which order: what callers see, where the time goes, where adapters are found, how
far the cluster is from its limits. Must not know how Grafana is deployed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OUTPUT = Path(__file__).with_name("dashboards") / "loraplex.json"

WIDTH, HEIGHT = 24, 8
STAGES = ("queue", "fetch", "swap", "denoise", "decode")
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
BASE = '{base=~"$base"}'
DEPLOYMENT = '{deployment=~"base-.*"}'


@dataclass(frozen=True, slots=True)
class Panel:
    """One graph: `queries` are pairs of legend and PromQL, `unit` is Grafana's name of one."""

    title: str
    description: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    is_stacked: bool = False


def _rate(metric: str, by: str, labels: str = BASE) -> str:
    return f"sum by ({by}) (rate({metric}{labels}[$__rate_interval]))"


def _sum(metric: str, labels: str = DEPLOYMENT) -> str:
    return f"sum by (deployment) ({metric}{labels})"


def _quantile(share: float, metric: str, by: str = "base") -> str:
    return f"histogram_quantile({share}, {_rate(f'{metric}_bucket', f'{by}, le')})"


def _mean(metric: str) -> str:
    return f"sum(rate({metric}_sum{BASE}[$__rate_interval])) / sum(rate({metric}_count{BASE}[$__rate_interval]))"


ROWS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    (
        "What callers see",
        (
            Panel(
                "Requests",
                "Answers a second, by base.",
                "reqps",
                (("{{base}}", _rate("ray_loraplex_requests_total", "base")),),
                is_stacked=True,
            ),
            Panel(
                "Answers by status",
                "4xx are the caller's, 5xx are ours.",
                "reqps",
                (("{{status}}", _rate("ray_loraplex_requests_total", "status")),),
                is_stacked=True,
            ),
            Panel(
                "Refusals",
                "Errors by their code; docs/http.md says what each means.",
                "reqps",
                (("{{code}}", _rate("ray_loraplex_refusals_total", "code", "")),),
                is_stacked=True,
            ),
            Panel(
                "Given up by callers",
                "By how far the request was.",
                "reqps",
                (("{{stage}}", _rate("ray_loraplex_cancelled_total", "stage")),),
            ),
        ),
    ),
    (
        "Where the time goes",
        (
            Panel(
                "Mean time by stage",
                "Stacked, it is the mean time of a request inside a replica.",
                "s",
                tuple((stage, _mean(f"ray_loraplex_{stage}_seconds")) for stage in STAGES),
                is_stacked=True,
            ),
            Panel(
                "95th percentile by stage",
                "Of all chosen bases together.",
                "s",
                tuple(
                    (stage, f"histogram_quantile(0.95, {_rate(f'ray_loraplex_{stage}_seconds_bucket', 'le')})")
                    for stage in STAGES
                ),
            ),
            Panel(
                "Swap, 95th percentile",
                "Changing adapters: milliseconds unless memory is short.",
                "s",
                (("{{base}}", _quantile(0.95, "ray_loraplex_swap_seconds")),),
            ),
            Panel(
                "Images in a device pass",
                "More means that requests share passes.",
                "short",
                (("mean", _mean("ray_loraplex_batch_images")),),
            ),
        ),
    ),
    (
        "Adapters",
        (
            Panel(
                "Found on which tier",
                "host: in memory; disk: admitted before; remote: fetched and checked.",
                "reqps",
                (("{{tier}}", _rate("ray_loraplex_adapter_lookups_total", "tier")),),
                is_stacked=True,
            ),
            Panel(
                "Fetch, 95th percentile",
                "What a request waited for its adapters.",
                "s",
                (("{{base}}", _quantile(0.95, "ray_loraplex_fetch_seconds")),),
            ),
            Panel(
                "Files brought to a node",
                "From a peer's disk through Ray's object store, from the Hub, or from a bucket.",
                "reqps",
                (("{{source}}", _rate("ray_loraplex_file_fetches_total", "source")),),
                is_stacked=True,
            ),
            Panel(
                "Routed to a replica where the adapter was",
                "Where the farthest of a request's adapters lay on the replica that was chosen.",
                "reqps",
                (("{{tier}}", _rate("ray_loraplex_routed_total", "tier")),),
                is_stacked=True,
            ),
            Panel(
                "In host memory",
                "Against replica.host_cache of each base.",
                "bytes",
                (("{{base}}", f"sum by (base) (ray_loraplex_resident_bytes{BASE})"),),
            ),
            Panel(
                "Evictions from host memory",
                "Many, with many disk hits, ask for a larger host_cache.",
                "reqps",
                (("{{base}}", _rate("ray_loraplex_evictions_total", "base")),),
            ),
            Panel(
                "Requests by adapter",
                "Those asked for most by their ids, the rest as other, those that not everybody may read as private.",
                "reqps",
                (("{{adapter}}", _rate("ray_loraplex_adapter_requests_total", "adapter")),),
                is_stacked=True,
            ),
            Panel(
                "Device time by adapter",
                "Seconds of device time a second: what each costs.",
                "short",
                (("{{adapter}}", _rate("ray_loraplex_adapter_device_seconds_total", "adapter")),),
                is_stacked=True,
            ),
        ),
    ),
    (
        "Capacity",
        (
            Panel(
                "Waiting and running",
                "Queued at the handles, and running in replicas.",
                "short",
                (
                    ("{{deployment}} waiting", _sum("ray_serve_deployment_queued_queries")),
                    ("{{deployment}} running", _sum("ray_serve_replica_processing_queries")),
                ),
            ),
            Panel(
                "Replicas",
                "Running, and what autoscaling wants.",
                "short",
                (
                    ("{{deployment}} running", _sum("ray_serve_deployment_replica_healthy")),
                    (
                        "{{deployment}} wanted",
                        f"max by (deployment) (ray_serve_autoscaling_target_replicas{DEPLOYMENT})",
                    ),
                ),
            ),
            Panel(
                "Predicted work ahead",
                "What each base's replicas have before them; autoscaling holds it at target_wait_s a replica.",
                "s",
                (("{{base}}", f"sum by (base) (ray_loraplex_backlog_seconds{BASE})"),),
            ),
            Panel(
                "Devices busy",
                "Seconds of device time a second: how many devices' worth of work is done.",
                "short",
                (("{{base}}", _rate("ray_loraplex_busy_seconds_total", "base")),),
                is_stacked=True,
            ),
            Panel(
                "Took, against predicted",
                "1 where the prediction holds; routing and autoscaling rest on it.",
                "short",
                (
                    (
                        "{{base}}",
                        f"{_rate('ray_loraplex_busy_seconds_total', 'base')}"
                        f" / {_rate('ray_loraplex_predicted_seconds_total', 'base')}",
                    ),
                ),
            ),
            Panel(
                "Start of a replica",
                "From its start to its first request: loading the base, warming, fetching adapters.",
                "s",
                (("{{base}}", f"max by (base) (ray_loraplex_start_seconds{BASE})"),),
            ),
            Panel(
                "Queue, 95th percentile",
                "Wait in a replica for its device.",
                "s",
                (("{{base}}", _quantile(0.95, "ray_loraplex_queue_seconds")),),
            ),
            Panel(
                "Lost replicas and self-checks",
                "Requests that lost their replica or their ingress; checks of the weights that failed.",
                "short",
                (
                    (
                        "{{base}} sent again",
                        f"sum by (base) (increase(ray_loraplex_retries_total{BASE}[$__rate_interval]))",
                    ),
                    (
                        "ingress, {{outcome}}",
                        "sum by (outcome) (increase(ray_loraplex_ingress_losses_total[$__rate_interval]))",
                    ),
                    (
                        "{{base}} damaged",
                        'sum by (base) (ray_loraplex_self_checks_total{base=~"$base", outcome="mismatch"})',
                    ),
                ),
            ),
            Panel(
                "In quarantine",
                "Adapters, by scale, refused for now because they failed on the device.",
                "short",
                (("{{base}}", f"sum by (base) (ray_loraplex_quarantined{BASE})"),),
            ),
            Panel(
                "No room on the device",
                "Passes that ran out of memory: drawn again one by one, or refused with `out_of_memory`.",
                "short",
                (
                    (
                        "{{base}} {{outcome}}",
                        "sum by (base, outcome) "
                        f"(increase(ray_loraplex_memory_shortages_total{BASE}[$__rate_interval]))",
                    ),
                ),
            ),
        ),
    ),
)


def dashboard() -> dict[str, Any]:
    """Return the dashboard in Grafana's JSON model."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS:
        panels.append(_row(title, len(panels) + 1, y))
        y += 1
        for index, panel in enumerate(row):
            x = index % 2 * (WIDTH // 2)
            panels.append(_graph(panel, len(panels) + 1, x, y + index // 2 * HEIGHT))
        y += (len(row) + 1) // 2 * HEIGHT
    return {
        "uid": "loraplex",
        "title": "Loraplex",
        "description": "Generated by cluster/grafana/dashboard.py; docs/operations.md says how to read it.",
        "schemaVersion": 39,
        "editable": False,
        "graphTooltip": 1,
        "refresh": "30s",
        "tags": ["loraplex"],
        "time": {"from": "now-3h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": [_datasource_variable(), _base_variable()]},
        "panels": panels,
    }


def _row(title: str, panel_id: int, y: int) -> dict[str, Any]:
    place = {"x": 0, "y": y, "w": WIDTH, "h": 1}
    return {"id": panel_id, "type": "row", "title": title, "collapsed": False, "gridPos": place, "panels": []}


def _graph(panel: Panel, panel_id: int, x: int, y: int) -> dict[str, Any]:
    stacking = {"mode": "normal" if panel.is_stacked else "none"}
    custom = {"fillOpacity": 20 if panel.is_stacked else 0, "showPoints": "never", "stacking": stacking}
    targets = [
        {"refId": chr(ord("A") + index), "datasource": DATASOURCE, "expr": expr, "legendFormat": legend}
        for index, (legend, expr) in enumerate(panel.queries)
    ]
    return {
        "id": panel_id,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.description,
        "datasource": DATASOURCE,
        "gridPos": {"x": x, "y": y, "w": WIDTH // 2, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0, "custom": custom}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": targets,
    }


def _datasource_variable() -> dict[str, Any]:
    return {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}


def _base_variable() -> dict[str, Any]:
    return {
        "name": "base",
        "label": "Base",
        "type": "query",
        "datasource": DATASOURCE,
        "query": "label_values(ray_loraplex_requests_total, base)",
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def text() -> str:
    """Return the dashboard as the file holds it."""
    return json.dumps(dashboard(), indent=2) + "\n"


if __name__ == "__main__":
    OUTPUT.write_text(text(), encoding="utf-8")
