"""A Serve config file, read and validated strictly.

Owns what `loraplex check` refuses: Ray Serve ignores unknown keys silently, so every mapping of the file is compared
with the fields that Serve's own schema knows, and the application's `args` with `AppConfig`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from serve_app.catalog.sources.bucket import StorePackageMissing, check_stores
from serve_app.config import AppConfig
from serve_app.deployments.front.own_routes import INGRESS_NAME
from serve_app.families.config_files import missing_packer, unusable_reason
from serve_app.families.single_file import unusable_file_reason
from serve_app.live_settings import with_live_settings
from serve_app.observability.tracing import TracingUnavailable, check_tracing
from serve_app.settings import faults_of, nearest

if TYPE_CHECKING:
    from ray.serve.schema import DeploymentSchema

IMPORT_PATH = "serve_app.app:build"


class ServeFileInvalid(Exception):
    """The file is invalid; `faults` has one line for each reason."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__(*faults)
        self.faults = faults


@dataclass(frozen=True, slots=True)
class ServeFileReport:
    """A valid file: its address, and its Loraplex applications."""

    url: str
    applications: tuple[AppConfig, ...]

    @property
    def summary(self) -> list[str]:
        """A short description of each served model."""
        return [f"{base.id} ({base.dtype})" for config in self.applications for base in config.bases]

    @property
    def gpus(self) -> tuple[int, int]:
        """How many GPUs all bases need with their fewest replicas, and with their most."""
        bases = [base for config in self.applications for base in config.bases]
        least = [(base.autoscaling.min_replicas, base.replica.num_gpus) for base in bases]
        most = [(base.autoscaling.max_replicas, base.replica.num_gpus) for base in bases]
        return gpus_for(least), gpus_for(most)

    @property
    def what_to_try(self) -> str:
        """Commands to try once the service is ready."""
        lines = [f"\n[bold green]ready[/] at {self.url}", ""]
        body = """-d '{"inputs": "a large yellow star on a blue background"}'"""
        for config in self.applications:
            lines += [f"  curl {self.url} {body} -o base.jpg"]
            if config.adapters.embedded:
                adapter = f"{config.default.id}-sepia"
                lines += [f"  curl -H 'lora: {adapter}' {self.url} {body} -o adapter.jpg"]
        return "\n".join([*lines, "", f"  {self.url}/docs describes the API; Ctrl-C stops the service"])


def check_serve_file(path: Path) -> ServeFileReport:
    """Return the contents of a Serve file after checking every key and value.

    Raises:
        ServeFileInvalid: with every fault that was found.
    """
    from ray.serve.schema import ServeDeploySchema

    data = _read(path)
    faults = _unknown_keys(data, ServeDeploySchema, "")
    try:
        schema = ServeDeploySchema.model_validate(data)
    except ValidationError as error:
        raise ServeFileInvalid(faults + faults_of(error, "")) from None
    listed = [(one.import_path, one.args, _user_configs(one.deployments)) for one in schema.applications]
    applications = _applications(listed, faults)
    options = schema.http_options
    disagreements = [
        fault for config in applications for fault in timeout_disagreements(config, options.request_timeout_s)
    ]
    if disagreements:
        raise ServeFileInvalid(disagreements)
    host = "127.0.0.1" if options.host in ("0.0.0.0", "::") else options.host
    return ServeFileReport(url=f"http://{host}:{options.port}", applications=applications)


def gpus_for(replicas: Iterable[tuple[int, float]]) -> int:
    """Return how many GPUs hold (number, GPUs each) of replicas: whole ones, and fractions packed the largest first.

    Ray may pack fractions less well, in the order in which replicas start.
    """
    listed = list(replicas)
    whole = sum(count * math.ceil(each) for count, each in listed if each >= 1)
    free: list[float] = []
    for count, each in sorted(listed, key=lambda one: -one[1]):
        for _ in range(count if 0 < each < 1 else 0):
            # Ray counts GPUs in ten-thousandths.
            room = next((index for index, left in enumerate(free) if left >= each - 1e-4), None)
            if room is None:
                free.append(1 - each)
            else:
                free[room] -= each
    return whole + len(free)


def timeout_disagreements(config: AppConfig, proxy_timeout_s: float | None) -> list[str]:
    """Return a fault for each two times of a configuration that do not go together; `proxy_timeout_s` is Serve's."""
    limit_s = config.ingress.request_timeout_s
    faults: list[str] = []
    if proxy_timeout_s is not None and proxy_timeout_s <= limit_s:
        faults.append(
            f"http_options.request_timeout_s: {proxy_timeout_s:g} s must be over ingress.request_timeout_s, "
            f"{limit_s:g} s: callers would get Serve's bare 408 before our error"
        )
    for base in config.bases:
        grace_s, backlog_s = base.replica.graceful_shutdown_timeout_s, base.replica.max_backlog_s
        if grace_s is not None and grace_s < limit_s:
            faults.append(
                f"{base.id}: replica.graceful_shutdown_timeout_s {grace_s:g} s is under ingress.request_timeout_s, "
                f"{limit_s:g} s: a scale-down would cut requests off"
            )
        if backlog_s is not None and backlog_s > limit_s:
            faults.append(
                f"{base.id}: replica.max_backlog_s {backlog_s:g} s is over ingress.request_timeout_s, {limit_s:g} s: "
                "requests would be accepted that cannot be answered in time"
            )
    return faults


def applications_of(path: Path) -> tuple[AppConfig, ...]:
    """Return the Loraplex applications of a Serve file, without Ray; Serve's own keys are not checked.

    Raises:
        ServeFileInvalid: with every fault that was found.
    """
    listed = _read(path).get("applications")
    if not isinstance(listed, list):
        raise ServeFileInvalid(["applications: is not a list"])
    found = [one for one in listed if isinstance(one, dict)]
    return _applications([(one.get("import_path"), one.get("args") or {}, {}) for one in found], [])


def _user_configs(deployments: list[DeploymentSchema]) -> dict[str, Any]:
    """Return the `user_config` of each deployment that a file gives one."""
    return {one.name: one.user_config for one in deployments if "user_config" in one.model_fields_set}


def _applications(listed: Sequence[tuple[Any, Any, Mapping[str, Any]]], faults: list[str]) -> tuple[AppConfig, ...]:
    """Return those of the (import path, args, user_config by deployment) listed that are Loraplex's; `faults` are those
    found before."""
    applications: list[AppConfig] = []
    for index, (import_path, args, user_configs) in enumerate(listed):
        if import_path != IMPORT_PATH:
            continue
        try:
            applications.append(AppConfig.model_validate(args))
            check_tracing(applications[-1].tracing)
            check_stores(applications[-1].adapters.stores)
            faults += _unusable_bases(applications[-1], f"applications.{index}.args.bases.")
            faults += _live_faults(applications[-1], user_configs, f"applications.{index}.deployments")
        except ValidationError as error:
            faults += faults_of(error, f"applications.{index}.args.")
        except (TracingUnavailable, StorePackageMissing) as error:
            faults.append(f"applications.{index}.args: {error}")
    if not applications and not faults:
        faults.append(f"no application has import_path {IMPORT_PATH}")
    if faults:
        raise ServeFileInvalid(faults)
    return tuple(applications)


def _live_faults(config: AppConfig, user_configs: Mapping[str, Any], place: str) -> list[str]:
    """Return a fault for each `user_config` that its deployment would not take."""
    faults: list[str] = []
    for name, user_config in user_configs.items():
        if name != INGRESS_NAME:
            faults.append(f"{place}: only {INGRESS_NAME} takes a user_config, not {name}")
            continue
        try:
            with_live_settings(config, user_config)
        except ValueError as error:
            faults.append(f"{place}: {name}: user_config.{error}")
    return faults


def _unusable_bases(config: AppConfig, place: str) -> list[str]:
    """Return a fault for each base whose folder or files are here and show that it cannot be served."""
    faults: list[str] = []
    for index, base in enumerate(config.bases):
        folder = base.source.described_by.folder
        reasons = [unusable_reason(folder)] if folder is not None and folder.exists() else []
        reasons += [] if base.quantization is None else [missing_packer(base.quantization)]
        files = [source.file for source in (base.source, *base.part_sources.values())]
        reasons += [unusable_file_reason(file) for file in files if file is not None and file.exists()]
        faults += [f"{place}{index}: {reason}" for reason in reasons if reason is not None]
    return faults


def _read(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ServeFileInvalid([f"cannot be read: {' '.join(str(error).split())}"]) from None
    if not isinstance(data, dict):
        raise ServeFileInvalid(["is not a mapping of keys"])
    return data


def _unknown_keys(data: Any, model: type[BaseModel], place: str) -> list[str]:
    """Return an error for every key below `data` that `model` does not know; free-form mappings are not checked."""
    if not isinstance(data, dict):
        return []
    fields = model.model_fields
    known = list(fields) + [field.alias for field in fields.values() if field.alias]
    faults: list[str] = []
    for key, value in data.items():
        here = f"{place}{key}"
        if key not in known:
            faults.append(f"{here}: unknown key{nearest(str(key), known)}")
            continue
        nested = _model_of(fields[key].annotation) if key in fields else None
        if nested is None:
            continue
        items = enumerate(value) if isinstance(value, list) else [(None, value)]
        for index, item in items:
            faults += _unknown_keys(item, nested, f"{here}." if index is None else f"{here}.{index}.")
    return faults


def _model_of(annotation: Any) -> type[BaseModel] | None:
    """Return the one pydantic model inside an annotation such as `list[Model] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, list, tuple):
        for part in get_args(annotation):
            found = _model_of(part)
            if found is not None:
                return found
    return None
