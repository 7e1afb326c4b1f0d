"""Every check of `cluster/` finds a typo that is planted; `make check` runs all of them on what is there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from cluster.checks import kubernetes, machines, monitoring
from cluster.checks.kustomize import render
from cluster.checks.tools import ToolMissing, find
from cluster.grafana import dashboard

ROOT = Path(__file__).parents[3]
NEEDED = ("serve_app", "docs", "pyproject.toml", "constraints.txt", "README.md", "LICENSE")

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed: it comes with Debian's package prometheus"
)


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """A copy of `cluster/` among what its image is made of."""
    for name in NEEDED:
        (tmp_path / name).symlink_to(ROOT / name)
    return Path(shutil.copytree(ROOT / "cluster", tmp_path / "cluster", ignore=shutil.ignore_patterns("__pycache__")))


def plant(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text, f"{path.name} no longer says {old!r}"
    path.write_text(text.replace(old, new, 1))


def overlay(name: str) -> Callable[[Path], Iterable[str]]:
    return lambda cluster: kubernetes.overlay_faults(cluster / "kuberay" / "overlays" / name)


def rules(cluster: Path) -> list[str]:
    return list(monitoring.check_rules(cluster / "prometheus", cluster.parent / "docs" / "operations.md"))


TYPOS = [
    (machines.check_serve_files, "serve_config.gpu.yaml", "max_batch_images:", "max_batch_imags:", "max_batch_images"),
    (machines.check_serve_files, "serve_config.demo.yaml", "proxy_location", "proxy_loc", "proxy_loc"),
    (machines.check_ray_up, "ray-up/aws.yaml", "max_workers: 12", "max_wrkers: 12", "max_wrkers"),
    (machines.check_ray_up, "ray-up/aws.yaml", "min_workers: 2", "min_worker: 2", "min_worker"),
    (machines.check_ray_up, "ray-up/gcp.yaml", "head_node_type: head", "head_node_type: haed", "head"),
    (machines.check_ray_up, "ray-up/gcp.yaml", "resources: {CPU: 16, GPU: 1}", 'resources: {CPU: "16"}', "resources"),
    (machines.check_image, "Dockerfile", "install -y --no", "install --no", "DL3014"),
    (machines.check_image, "Dockerfile", "COPY serve_app ", "COPY serve_ap ", "serve_ap"),
    (machines.check_image, "Dockerfile", "--from=build-cpu", "--from=build-cpus", "build-cpus"),
    (machines.check_image, "Dockerfile", "WORKDIR /src", "WORKDIRR /src", "Dockerfile"),
    (machines.check_compose, "compose.yaml", "stop_grace_period", "stop_grace_perod", "stop_grace_perod"),
    (machines.check_compose, "compose.yaml", "- cache:/var", "- cahce:/var", "cahce"),
    (machines.check_compose, "compose.yaml", "127.0.0.1:3000", "3000", "3000"),
    (machines.check_compose, "compose.gpu.yaml", "capabilities", "capabilites", "capabilites"),
    (overlay("cpu-demo"), "kuberay/base/rayservice.yaml", "idleTimeoutSeconds", "idleTimeoutSecs", "idleTimeoutSecs"),
    (overlay("cpu-demo"), "kuberay/base/rayservice.yaml", "livenessProbe", "livenesProbe", "livenesProbe"),
    (overlay("cpu-demo"), "kuberay/base/rayservice.yaml", "2.60.0", "2.59.0", "rayVersion"),
    (overlay("cpu-demo"), "kuberay/base/network-policy.yaml", "policyTypes", "policyType", "policyType"),
    (overlay("cpu-demo"), "kuberay/base/disruption-budget.yaml", "minAvailable: 1", "minAvailble: 1", "minAvailble"),
    (overlay("cpu-demo"), "kuberay/base/service-account.yaml", "automount", "autmount", "autmount"),
    (overlay("cpu-demo"), "kuberay/overlays/cpu-demo/serve.yaml", "torch_threads", "torch_thread", "torch_thread"),
    (overlay("cpu-demo"), "kuberay/overlays/cpu-demo/workers.yaml", "name: loraplex", "name: lorplex", "lorplex"),
    (overlay("cpu-demo"), "kuberay/overlays/cpu-demo/workers.yaml", "PeriodSeconds: 160", "PeriodSeconds: 60", "under"),
    (overlay("cpu-demo"), "kuberay/overlays/cpu-demo/kustomization.yaml", "patches", "patchs", "patchs"),
    (overlay("cpu-demo"), "kuberay/overlays/cpu-demo/kustomization.yaml", "path: serve", "path: srve", "srve.yaml"),
    (overlay("many-gpus"), "kuberay/overlays/many-gpus/gcs.yaml", "serviceName", "servceName", "servceName"),
    (
        kubernetes.served_faults,
        "kuberay/overlays/many-gpus/serve.yaml",
        "max_replicas: 8",
        "max_replicas: 9",
        "no longer",
    ),
    (overlay("many-gpus"), "kuberay/overlays/many-gpus/serve.yaml", "cluster_gpus: 10", "weight: 1", "grow to 10 GPUs"),
    (overlay("many-gpus"), "kuberay/overlays/many-gpus/workers.yaml", "maxReplicas: 8", "maxReplicas: 9", "11 GPUs"),
    (kubernetes.single_faults, "kuberay/secret.example.yaml", "stringData", "stringDta", "stringDta"),
    (kubernetes.single_faults, "kuberay/pod-monitor.yaml", "interval", "intervall", "intervall"),
]


@pytest.mark.parametrize(("check", "file", "old", "new", "said"), TYPOS, ids=[f"{t[1]} {t[3]}" for t in TYPOS])
def test_a_planted_typo_is_found(
    cluster: Path, check: Callable[[Path], Iterable[str]], file: str, old: str, new: str, said: str
) -> None:
    plant(cluster / file, old, new)
    assert any(said in fault for fault in check(cluster))


@needs_promtool
@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("prometheus.yml", "scrape_interval", "scrape_intervall", "scrape_intervall"),
        ("recording.rules.yml", "histogram_quantile(0.95,", "histogram_quantile(0.95;", "unexpected"),
        ("recording.rules.yml", "loraplex_requests_total", "loraplex_request_total", "ray_loraplex_request_total"),
        ("alerts.rules.yml", "base:loraplex_errors:ratio5m", "base:loraplex_errors:ratio", "nothing records"),
        ("alerts.rules.yml", "alert: LoraplexDown", "alert: LoraplexDwon", "runbook is not"),
        ("alerts.rules.yml", "severity: page", "severity: pager", "neither page nor warn"),
        ("alerts.rules.yml", "> 0.02 and", "> 0.2 and", "LoraplexErrors"),
    ],
)
def test_a_planted_typo_in_the_rules_is_found(cluster: Path, file: str, old: str, new: str, said: str) -> None:
    plant(cluster / "prometheus" / file, old, new)
    assert any(said in fault for fault in rules(cluster))


@needs_promtool
@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("ray_loraplex_queue_seconds_bucket", "ray_loraplex_queue_second_bucket", "nothing exports"),
        ("histogram_quantile(0.95,", "histogram_quantle(0.95,", "unknown function"),
        ('"unit": "s"', '"unit": "secs"', "secs"),
        ('"legendFormat": "{{base}}"', '"legendFromat": "{{base}}"', "legendFormat"),
        ('"x": 12', '"x": 6', "overlap"),
    ],
)
def test_a_planted_typo_in_the_dashboard_is_found(old: str, new: str, said: str) -> None:
    text = dashboard.text()
    assert old in text
    assert any(said in fault for fault in monitoring.dashboard_faults(json.loads(text.replace(old, new))))


@needs_promtool
def test_a_dashboard_that_was_edited_by_hand_is_found(cluster: Path) -> None:
    plant(cluster / "grafana" / "dashboards" / "loraplex.json", "Requests", "Asked")
    assert any("is not what" in fault for fault in monitoring.check_dashboard(cluster / "grafana"))


def test_an_overlay_merges_what_it_names_and_keeps_the_rest() -> None:
    objects = render(ROOT / "cluster" / "kuberay" / "overlays" / "cpu-demo")
    (service,) = [item for item in objects if item["kind"] == "RayService"]
    assert service["metadata"]["namespace"] == "loraplex"
    assert service["spec"]["rayClusterConfig"]["authOptions"] == {"mode": "token"}
    assert [group["groupName"] for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]] == ["cpu"]
    assert "demo/sdxl" in service["spec"]["serveConfigV2"]


def test_a_missing_tool_is_said_by_name() -> None:
    with pytest.raises(ToolMissing, match="no-such-tool is not installed: ask the shop"):
        find("no-such-tool", "ask the shop")
