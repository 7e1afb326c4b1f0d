"""Prometheus and Grafana: files that parse, names that exist, alerts that somebody can act on.

Owns the names: every metric in a rule or a panel is one that the service declares (`observability.metrics`) or one of
those of Ray Serve listed here; a test compares both with what a running service exports.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import yaml

from cluster.checks import schemas, tools
from cluster.grafana import dashboard
from serve_app.observability.metrics import DECLARED

PROMTOOL = "it comes with Debian's package prometheus, and with Prometheus itself"
RULES = ("recording.rules.yml", "alerts.rules.yml")
RUNBOOK = "docs/operations.md"
SERVE_METRICS = frozenset(
    {
        "ray_serve_autoscaling_target_replicas",
        "ray_serve_deployment_queued_queries",
        "ray_serve_deployment_replica_healthy",
        "ray_serve_replica_processing_queries",
    }
)

_NAME = re.compile(r"\bray_[a-z0-9_]+\b")
_RECORDED = re.compile(r"\b[a-z]+:[a-z0-9_]+:[a-z0-9_]+\b")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def check(cluster: Path) -> list[str]:
    """Return the faults of `prometheus/` and `grafana/`."""
    return [*check_rules(cluster / "prometheus", cluster.parent / RUNBOOK), *check_dashboard(cluster / "grafana")]


def check_rules(folder: Path, runbook: Path) -> Iterator[str]:
    """Yield what is wrong with the scrape configuration and the rules."""
    promtool = tools.find("promtool", PROMTOOL)
    yield from tools.faults_of([promtool, "check", "config", "prometheus.yml"], folder)
    yield from tools.faults_of([promtool, "test", "rules", "alerts.test.yml"], folder)
    groups = [group for name in RULES for group in schemas.documents(folder / name)[0]["groups"]]
    rules = [rule for group in groups for rule in group["rules"]]
    recorded = {rule["record"] for rule in rules if "record" in rule}
    anchors = _anchors(runbook)
    for rule in rules:
        name = rule.get("record") or rule["alert"]
        yield from (f"{name}: {fault}" for fault in name_faults(rule["expr"], recorded))
        if "alert" in rule:
            yield from _alert_faults(rule, anchors)


def check_dashboard(folder: Path) -> Iterator[str]:
    """Yield what is wrong with the dashboard: its model, its layout, its queries."""
    path = folder / "dashboards" / "loraplex.json"
    text = path.read_text(encoding="utf-8")
    if text != dashboard.text():
        yield f"{path.name} is not what `python -m cluster.grafana.dashboard` writes"
    data = json.loads(text)
    yield from dashboard_faults(data)
    for source in sorted((folder / "provisioning").rglob("*.yaml")):
        (content,) = schemas.documents(source)
        if content.get("apiVersion") != 1:
            yield f"{source.name}: apiVersion is not 1"


def dashboard_faults(data: dict[str, Any]) -> Iterator[str]:
    """Yield what a linter says of a dashboard."""
    yield from schemas.faults_of("dashboard", data, "dashboard")
    panels = data.get("panels", [])
    ids = [panel.get("id") for panel in panels]
    if len(set(ids)) != len(ids):
        yield "dashboard: two panels have the same id"
    for one, other in combinations(panels, 2):
        if _overlap(one["gridPos"], other["gridPos"]):
            yield f"dashboard: '{one['title']}' and '{other['title']}' overlap"
    queries = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    yield from (f"dashboard: {fault}" for query in queries for fault in name_faults(query, set()))
    yield from query_faults(queries)


def query_faults(queries: list[str]) -> Iterator[str]:
    """Yield what promtool says of some queries, Grafana's variables filled in."""
    rules = [
        {"record": f"panel:query:{index}", "expr": query.replace("$__rate_interval", "1m").replace("$base", ".*")}
        for index, query in enumerate(queries)
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "panels.rules.yml"
        path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}), encoding="utf-8")
        promtool = tools.find("promtool", PROMTOOL)
        yield from (
            f"dashboard: {fault}" for fault in tools.faults_of([promtool, "check", "rules", path.name], path.parent)
        )


def exported_names() -> set[str]:
    """Return the names under which the declared metrics are exported, for each of their kinds."""
    suffixes = {True: ("_bucket", "_sum", "_count"), False: ("", "_total")}
    return {f"ray_{one.name}{suffix}" for one in DECLARED for suffix in suffixes[bool(one.buckets)]}


def names_in(expression: str) -> set[str]:
    """Return the metrics of Ray that a PromQL expression names."""
    return set(_NAME.findall(expression))


def name_faults(expression: str, recorded: set[str]) -> Iterator[str]:
    """Yield the metrics of an expression that are neither exported nor recorded."""
    yield from (f"nothing exports {name}" for name in sorted(names_in(expression) - exported_names() - SERVE_METRICS))
    yield from (f"nothing records {name}" for name in sorted(set(_RECORDED.findall(expression)) - recorded))


def _alert_faults(rule: dict[str, Any], anchors: set[str]) -> Iterator[str]:
    name, link = rule["alert"], f"{RUNBOOK}#{rule['alert'].lower()}"
    if rule.get("labels", {}).get("severity") not in ("page", "warn"):
        yield f"{name}: severity is neither page nor warn"
    if "summary" not in rule.get("annotations", {}):
        yield f"{name}: has no summary"
    if rule.get("annotations", {}).get("runbook") != link:
        yield f"{name}: its runbook is not {link}"
    if name.lower() not in anchors:
        yield f"{name}: {RUNBOOK} has no such section"


def _anchors(runbook: Path) -> set[str]:
    if not runbook.exists():
        return set()
    headings = _HEADING.findall(runbook.read_text(encoding="utf-8"))
    return {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _overlap(one: dict[str, int], other: dict[str, int]) -> bool:
    return (
        one["x"] < other["x"] + other["w"]
        and other["x"] < one["x"] + one["w"]
        and one["y"] < other["y"] + other["h"]
        and other["y"] < one["y"] + one["h"]
    )
