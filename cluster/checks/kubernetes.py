"""The KubeRay overlays: rendered, then every object against the schema of what will read it.

Owns which schema goes with which object: Kubernetes' own for its kinds and for pod templates, ours for RayService and
PodMonitor, Serve's and Loraplex's own for what a RayService serves.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import ray
import yaml

from cluster.checks import schemas, tools
from cluster.checks.kustomize import Unrenderable, identity, kubectl_render, render
from serve_app.cli.serve_file import ServeFileInvalid, check_serve_file

# The oldest Kubernetes that is still maintained, and so the one with the fewest fields.
KUBERNETES = "1.33"
OVERLAYS = ("one-gpu", "many-gpus", "cpu-demo")
OWN_SCHEMAS = {"RayService": "kuberay", "PodMonitor": "pod-monitor"}
# Overlays that serve a file of this folder, word for word but for how many GPUs the cluster may grow to.
SERVED = {"many-gpus": "serve_config.gpu.yaml", "cpu-demo": "serve_config.demo.yaml"}


def check(cluster: Path) -> list[str]:
    """Return the faults of everything under `kuberay/`."""
    overlays = [cluster / "kuberay" / "overlays" / name for name in OVERLAYS]
    found = [fault for folder in overlays for fault in overlay_faults(folder)]
    if not found:
        found += [fault for folder in overlays for fault in kubectl_faults(folder)]
    return [*found, *single_faults(cluster), *served_faults(cluster)]


def served_faults(cluster: Path) -> Iterator[str]:
    """Yield which overlays have parted from the files that they serve."""
    for overlay, name in SERVED.items():
        (patch,) = schemas.documents(cluster / "kuberay" / "overlays" / overlay / "serve.yaml")
        served = yaml.safe_load(patch["spec"]["serveConfigV2"])
        for scaling in _autoscaling_of(served):
            scaling.pop("cluster_gpus", None)
        if served != yaml.safe_load((cluster / name).read_text(encoding="utf-8")):
            yield f"{overlay}/serve.yaml no longer serves what {name} says"


def single_faults(cluster: Path) -> Iterator[str]:
    """Yield the faults of the files that belong to no overlay."""
    for path in sorted((cluster / "kuberay").glob("*.yaml")):
        for item in schemas.documents(path):
            yield from object_faults(item, path.name)


def object_faults(item: dict[str, Any], where: str) -> Iterator[str]:
    """Yield what anyone who reads this object would refuse, or worse, ignore."""
    kind, name = identity(item)
    here = f"{where}: {kind}/{name}"
    if kind not in OWN_SCHEMAS:
        yield from _core(item, here)
        return
    yield from schemas.faults_of(OWN_SCHEMAS[kind], item, here)
    if kind == "RayService":
        yield from _ray_service(item["spec"], here)


def overlay_faults(folder: Path) -> Iterator[str]:
    """Yield the faults of one overlay and of all that it renders to."""
    (config,) = schemas.documents(folder / "kustomization.yaml")
    faults = list(schemas.faults_of("kustomization", config, f"{folder.name}/kustomization.yaml"))
    if faults:
        yield from faults
        return
    try:
        objects = render(folder)
    except Unrenderable as error:
        yield f"{folder.name}: {error}"
        return
    for item in objects:
        yield from object_faults(item, folder.name)


def kubectl_faults(folder: Path) -> Iterator[str]:
    """Yield where kubectl, if it is installed, renders an overlay otherwise than `cluster.checks.kustomize`."""
    try:
        kubectl = tools.find("kubectl", "its Kustomize is compared with where it is")
    except tools.ToolMissing:
        return
    theirs = {identity(item): item for item in kubectl_render(kubectl, folder)}
    ours = {identity(item): item for item in render(folder)}
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            yield f"{folder.name}: kubectl renders {'/'.join(key)} otherwise than this check does"


def _core(item: dict[str, Any], where: str) -> Iterator[str]:
    try:
        kubernetes_validate.validate(item, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"{where}: {'.'.join(str(part) for part in error.path)}: {error.message[:300]}"
    except (kubernetes_validate.SchemaNotFoundError, kubernetes_validate.InvalidSchemaError) as error:
        yield f"{where}: {error}"


def _ray_service(spec: dict[str, Any], where: str) -> Iterator[str]:
    ray_cluster = spec.get("rayClusterConfig", {})
    if (version := ray_cluster.get("rayVersion")) != ray.__version__:
        yield f"{where}: rayVersion is {version}, but the image has {ray.__version__}"
    for group in [ray_cluster.get("headGroupSpec", {}), *ray_cluster.get("workerGroupSpecs", [])]:
        name = group.get("groupName", "head")
        template = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": name}}
        yield from _core(template | {"template": group.get("template")}, f"{where}: {name}")
        yield from _grace(group, spec.get("serveConfigV2", ""), f"{where}: {name}")
    yield from _gpus(ray_cluster.get("workerGroupSpecs", []), spec.get("serveConfigV2", ""), where)
    yield from serve_text_faults(spec.get("serveConfigV2", ""), f"{where}: serveConfigV2")


def _autoscaling_of(served: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield how each base is scaled; a mapping that YAML repeats comes again."""
    for application in served.get("applications", []):
        yield (application.get("args", {}).get("base") or {}).get("autoscaling", {})


def _gpus(groups: list[dict[str, Any]], serve_text: str, where: str) -> Iterator[str]:
    """Bases give way once the cluster has as many GPUs as they are told; one that grows must tell them."""
    fewest, most = (
        sum(_gpus_of(group) * group.get(end, 0) for group in groups) for end in ("minReplicas", "maxReplicas")
    )
    scaled = _autoscaling_of(yaml.safe_load(serve_text) or {})
    told = max((scaling.get("cluster_gpus") or 0 for scaling in scaled), default=0)
    if fewest < most != told:
        yield f"{where}: cluster_gpus is {told or 'not given'}, but the workers may grow to {most} GPUs"


def _gpus_of(group: dict[str, Any]) -> int:
    containers = group.get("template", {}).get("spec", {}).get("containers", [])
    limits = (container.get("resources", {}).get("limits", {}) for container in containers)
    return sum(int(limit.get("nvidia.com/gpu", 0)) for limit in limits)


def _grace(group: dict[str, Any], serve_text: str, where: str) -> Iterator[str]:
    """A worker must outlive the longest request that it may have accepted."""
    if "groupName" not in group:
        return
    longest_s = (yaml.safe_load(serve_text) or {}).get("http_options", {}).get("request_timeout_s", 0)
    grace_s = group.get("template", {}).get("spec", {}).get("terminationGracePeriodSeconds", 30)
    if grace_s < longest_s:
        yield f"{where}: terminationGracePeriodSeconds {grace_s} is under request_timeout_s {longest_s}"


def serve_text_faults(text: str, where: str) -> Iterator[str]:
    """Yield what `loraplex check` says of a Serve file that is only a text."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "serve.yaml"
        path.write_text(text, encoding="utf-8")
        try:
            check_serve_file(path)
        except ServeFileInvalid as error:
            yield from (f"{where}: {fault}" for fault in error.faults)
