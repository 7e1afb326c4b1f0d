"""A Serve config file, read and validated strictly.

Owns what `loraplex check` refuses: Ray Serve ignores unknown keys silently, so every mapping of the file is compared
with the fields that Serve's own schema knows, and the application's `args` with `AppConfig`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from serve_app.config import AppConfig
from serve_app.families.config_files import unusable_reason
from serve_app.observability.tracing import TracingUnavailable, check_tracing
from serve_app.settings import nearest

IMPORT_PATH = "serve_app.app:build"


class ServeFileInvalid(Exception):
    """The file is refused; `faults` has one line for each reason."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__(*faults)
        self.faults = faults


@dataclass(frozen=True, slots=True)
class ServeFileReport:
    """A valid file: where it will answer, and its Loraplex applications."""

    url: str
    applications: tuple[AppConfig, ...]

    @property
    def summary(self) -> list[str]:
        """What the file serves, in a few words each."""
        return [f"{base.id} ({base.dtype})" for config in self.applications for base in config.bases]

    @property
    def what_to_try(self) -> str:
        """What a person can paste into a terminal once the service is ready."""
        lines = [f"\n[bold green]ready[/] at {self.url}", ""]
        body = """-d '{"inputs": "a large yellow star on a blue background"}'"""
        for config in self.applications:
            lines += [f"  curl {self.url} {body} -o base.jpg"]
            if config.adapters.embedded:
                adapter = f"{config.default.id}-sepia"
                lines += [f"  curl -H 'lora: {adapter}' {self.url} {body} -o adapter.jpg"]
        return "\n".join([*lines, "", f"  {self.url}/docs describes the API; Ctrl-C stops the service"])


def check_serve_file(path: Path) -> ServeFileReport:
    """Return what a Serve file says, every key of it known and every value valid.

    Raises:
        ServeFileInvalid: with every fault that was found.
    """
    from ray.serve.schema import ServeDeploySchema

    data = _read(path)
    faults = _unknown_keys(data, ServeDeploySchema, "")
    try:
        schema = ServeDeploySchema.model_validate(data)
    except ValidationError as error:
        raise ServeFileInvalid(faults + _readable(error, "")) from None
    applications = _applications([(one.import_path, one.args) for one in schema.applications], faults)
    options = schema.http_options
    host = "127.0.0.1" if options.host in ("0.0.0.0", "::") else options.host
    return ServeFileReport(url=f"http://{host}:{options.port}", applications=applications)


def applications_of(path: Path) -> tuple[AppConfig, ...]:
    """Return the Loraplex applications of a Serve file, without Ray: what is Serve's own is not looked at.

    Raises:
        ServeFileInvalid: with every fault that was found.
    """
    listed = _read(path).get("applications")
    if not isinstance(listed, list):
        raise ServeFileInvalid(["applications: is not a list"])
    found = [one for one in listed if isinstance(one, dict)]
    return _applications([(one.get("import_path"), one.get("args") or {}) for one in found], [])


def _applications(listed: list[tuple[Any, Any]], faults: list[str]) -> tuple[AppConfig, ...]:
    """Return those of the (import path, args) listed that are Loraplex's; `faults` are those found before."""
    applications: list[AppConfig] = []
    for index, (import_path, args) in enumerate(listed):
        if import_path != IMPORT_PATH:
            continue
        try:
            applications.append(AppConfig.model_validate(args))
            check_tracing(applications[-1].tracing)
            faults += _unusable_bases(applications[-1], f"applications.{index}.args.bases.")
        except ValidationError as error:
            faults += _readable(error, f"applications.{index}.args.")
        except TracingUnavailable as error:
            faults.append(f"applications.{index}.args: {error}")
    if not applications and not faults:
        faults.append(f"no application has import_path {IMPORT_PATH}")
    if faults:
        raise ServeFileInvalid(faults)
    return tuple(applications)


def _unusable_bases(config: AppConfig, place: str) -> list[str]:
    """Return a fault for each base whose folder is here and shows that it cannot be served."""
    reasons = [
        unusable_reason(base.source.folder) if base.source.folder is not None and base.source.folder.exists() else None
        for base in config.bases
    ]
    return [f"{place}{index}: {reason}" for index, reason in enumerate(reasons) if reason is not None]


def _read(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ServeFileInvalid([f"cannot be read: {' '.join(str(error).split())}"]) from None
    if not isinstance(data, dict):
        raise ServeFileInvalid(["is not a mapping of keys"])
    return data


def _readable(error: ValidationError, prefix: str) -> list[str]:
    faults: list[str] = []
    for detail in error.errors(include_url=False):
        place = prefix + ".".join(str(part) for part in detail["loc"])
        faults.append(f"{place.rstrip('.')}: {detail['msg'].removeprefix('Value error, ')}")
    return faults


def _unknown_keys(data: Any, model: type[BaseModel], place: str) -> list[str]:
    """Return a fault for every key below `data` that `model` does not know; free-form mappings are left alone."""
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
