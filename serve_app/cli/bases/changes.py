"""One base more or less in what a cluster runs.

Owns the Serve configuration that comes of it, from what Serve says of the cluster. Serve's deploy call replaces all
applications that came through it, so those that are not ours stand in the new configuration as they were deployed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from serve_app.cli.serve_file import BASE_PATH, INGRESS_PATH, ServeFileInvalid, checked
from serve_app.cli.terminal import CommandFailed
from serve_app.config import AppConfig, BaseModelConfig
from serve_app.deployments.front.own_routes import INGRESS_NAME
from serve_app.settings import faults_of, nearest

# What Serve tells of a cluster and its deploy call takes.
OPTIONS = ("proxy_location", "http_options", "grpc_options", "target_capacity")
# What the application of a base has as its ingress has it.
AS_THE_INGRESS = ("runtime_env", "logging_config")


@dataclass(frozen=True, slots=True)
class Change:
    """A change of the bases of one application, as the Serve file that is to be deployed."""

    application: str
    base_id: str
    bases: tuple[str, ...]
    serve_file: dict[str, Any]


def read_base(path: Path) -> dict[str, Any]:
    """Return the entry of a base that a YAML file holds, as a Serve file has it under `bases`.

    Raises:
        CommandFailed: the file is not readable, or holds something else.
    """
    try:
        entry = yaml.safe_load(path.read_text(encoding="utf-8"))
        # It travels as JSON.
        entry = json.loads(json.dumps(entry, allow_nan=False))
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise CommandFailed(f"{path}: cannot be read: {' '.join(str(error).split())}", "invalid_base") from None
    if not isinstance(entry, dict):
        raise CommandFailed(f"{path}: is not one base: write 'id: ...', 'source: ...' without a list", "invalid_base")
    return entry


def with_base(details: Mapping[str, Any], entry: Mapping[str, Any], application: str | None = None) -> Change:
    """Return what a cluster runs with a base more; `details` is what Serve says of the cluster.

    Raises:
        CommandFailed: the base or what would come of it is refused.
    """
    try:
        base = BaseModelConfig.model_validate(entry)
    except ValidationError as error:
        raise CommandFailed("; ".join(faults_of(error, "base.")), "invalid_base") from None
    file = _deployed(details)
    ingress = _ingress(details, file, application)
    service = _service(file, ingress["name"], "what is deployed is not valid")
    if service.base(base.id) is not None:
        raise CommandFailed(f"base {base.id} is there already; deploy a Serve file to change it", "base_exists")
    found = details["applications"].get(base.application_name)
    if found is not None:
        raise CommandFailed(
            f"the cluster has an application {base.application_name} ({found['status']}): wait until it is gone, or "
            "give the base another by `application`",
            "application_exists",
        )
    _bases(ingress).append(dict(entry))
    file["applications"].append({
        "name": base.application_name,
        "route_prefix": None,
        "import_path": BASE_PATH,
        **{name: deepcopy(ingress[name]) for name in AS_THE_INGRESS if name in ingress},
        "args": {"shared": deepcopy(ingress.get("args", {}).get("shared", {})), "base": dict(entry)},
    })  # fmt: skip
    return _change(file, ingress, base.id)


def without_base(details: Mapping[str, Any], base_id: str, application: str | None = None) -> Change:
    """Return what a cluster runs with a base less; `details` is what Serve says of the cluster.

    Raises:
        CommandFailed: the base cannot be removed.
    """
    file = _deployed(details)
    ingress = _ingress(details, file, application)
    service = _service(file, ingress["name"], "what is deployed is not valid")
    ids = [base.id for base in service.bases]
    if base_id not in ids:
        raise CommandFailed(f"no base {base_id}{nearest(base_id, ids)}; served are {', '.join(ids)}", "unknown_base")
    if len(ids) == 1:
        raise CommandFailed(f"{base_id} is the only base: a service has at least one", "last_base")
    if base_id == service.default.id:
        raise CommandFailed(
            f"{base_id} is the base for requests that name none: deploy a Serve file with another default_base first",
            "default_base",
        )
    place = ids.index(base_id)
    del _bases(ingress)[place]
    gone = service.bases[place].application_name
    file["applications"] = [one for one in file["applications"] if one["name"] != gone]
    return _change(file, ingress, base_id)


def _change(file: dict[str, Any], ingress: Mapping[str, Any], base_id: str) -> Change:
    service = _service(file, ingress["name"], "what would be deployed is not valid")
    return Change(ingress["name"], base_id, tuple(base.id for base in service.bases), file)


def _deployed(details: Mapping[str, Any]) -> dict[str, Any]:
    """Return the Serve file of what is deployed; Serve leaves alone what came by `serve.run`, which is not in it."""
    applications: list[dict[str, Any]] = []
    for name, one in details["applications"].items():
        if _is_imperative(one) or one["status"] == "DELETING":
            continue
        config = one.get("deployed_app_config")
        if config is None:
            # A deployment without it would delete it.
            raise CommandFailed(f"Serve does not say how {name} is deployed; try again", "not_told")
        applications.append(deepcopy(config))
    return {**{name: details[name] for name in OPTIONS if details.get(name) is not None}, "applications": applications}


def _is_imperative(one: Mapping[str, Any]) -> bool:
    return one["source"] == "imperative"


def _ingress(details: Mapping[str, Any], file: Mapping[str, Any], application: str | None) -> dict[str, Any]:
    """Return the configuration of the ingress' application within a file."""
    running = details["applications"]
    ours = {one["name"]: one for one in file["applications"] if one["import_path"] == INGRESS_PATH}
    if application is None and len(ours) > 1:
        raise CommandFailed(f"there are several services: name one by --application: {', '.join(ours)}", "ambiguous")
    by_hand = [name for name, one in running.items() if _is_imperative(one) and INGRESS_NAME in one["deployments"]]
    if application in by_hand or (by_hand and not ours):
        name = application or by_hand[0]
        raise CommandFailed(
            f"{name} was deployed by serve.run, not from a Serve file: change its bases where it was", "not_declarative"
        )
    if application is None and not ours:
        there = f"; there are {', '.join(running)}" if running else ""
        raise CommandFailed(f"the cluster has no Loraplex service{there}", "no_service")
    if application is not None and application not in ours:
        raise CommandFailed(f"the cluster has no service {application}{nearest(application, [*ours])}", "no_service")
    return ours[application] if application is not None else next(iter(ours.values()))


def _bases(ingress: Mapping[str, Any]) -> list[dict[str, Any]]:
    deployment = next(one for one in ingress["deployments"] if one["name"] == INGRESS_NAME)
    return deployment["user_config"]["bases"]


def _service(file: Mapping[str, Any], name: str, otherwise: str) -> AppConfig:
    """Return the service of an application of a file that `loraplex check` would pass."""
    try:
        report = checked(deepcopy(dict(file)))
    except ServeFileInvalid as error:
        raise CommandFailed(f"{otherwise}: {'; '.join(error.faults)}", "invalid") from None
    return next(one for one in report.applications if one.service == name)
