"""Overlays rendered, by Kustomize's rules for the few of its features that are used here.

Owns resources, patches of one custom resource by JSON merge, and the namespace. `kubectl kustomize` is the judge: where
it is installed, the check compares. Must not know what the resources mean.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import yaml

from cluster.checks.schemas import documents

# Objects of no namespace.
CLUSTER_WIDE = ("Namespace",)


class Unrenderable(Exception):
    """An overlay names what is not there."""


def render(folder: Path) -> list[dict[str, Any]]:
    """Return the objects of a kustomization.

    Raises:
        Unrenderable: a file or the target of a patch is missing.
    """
    (config,) = _read(folder / "kustomization.yaml")
    objects: list[dict[str, Any]] = []
    for name in config["resources"]:
        place = folder / name
        objects += render(place) if place.is_dir() else _read(place)
    for patch in config.get("patches", []):
        (change,) = _read(folder / patch["path"])
        objects = _patched(objects, change, f"{folder.name}/{patch['path']}")
    if (namespace := config.get("namespace")) is not None:
        for item in objects:
            if item["kind"] not in CLUSTER_WIDE:
                item["metadata"]["namespace"] = namespace
    return objects


def kubectl_render(kubectl: str, folder: Path) -> list[dict[str, Any]]:
    """Return the same, as kubectl does it."""
    done = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, timeout=240, check=False)
    if done.returncode:
        raise Unrenderable(" ".join(done.stderr.split()))
    return [item for item in yaml.safe_load_all(done.stdout) if item is not None]


def identity(item: dict[str, Any]) -> tuple[str, str]:
    """Return the kind and name of an object."""
    return str(item.get("kind")), str(item.get("metadata", {}).get("name"))


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        return [item for item in documents(path) if item is not None]
    except FileNotFoundError:
        raise Unrenderable(f"{path.parent.name}/{path.name} is not there") from None


def _patched(objects: list[dict[str, Any]], change: dict[str, Any], where: str) -> list[dict[str, Any]]:
    targets = [item for item in objects if identity(item) == identity(change)]
    if len(targets) != 1:
        raise Unrenderable(f"{where} patches {'/'.join(identity(change))}, of which there are {len(targets)}")
    return [_merged(item, change) if item is targets[0] else item for item in objects]


def _merged(old: Any, new: Any) -> Any:
    """Merge mappings; any other new value replaces the old one, lists too, as Kubernetes does for custom resources."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    kept = {key: value for key, value in old.items() if key not in new}
    return kept | {key: _merged(old.get(key), value) for key, value in new.items() if value is not None}
