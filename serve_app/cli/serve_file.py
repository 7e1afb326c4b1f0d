"""A Serve config file, read and validated strictly.

Owns what `loraplex check` refuses: Ray Serve ignores unknown keys silently, so every mapping of the file is compared
with the fields that Serve's own schema knows, and the `args` of ours with their models. What several of our
applications have to say alike is compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from serve_app.autoscaling.sharing import LEAST_GPU, LongestWait, longest_wait
from serve_app.catalog.sources.bucket import StorePackageMissing, check_stores
from serve_app.config import AppConfig, BaseArguments, BaseModelConfig, IngressArguments, SharedSettings, serve_name
from serve_app.deployments.front.own_routes import INGRESS_NAME
from serve_app.families.config_files import family_in, missing_packer, unusable_reason
from serve_app.families.single_file import unusable_file_reason
from serve_app.live_settings import with_live_settings
from serve_app.observability.tracing import TracingUnavailable, check_tracing
from serve_app.settings import faults_of, nearest

if TYPE_CHECKING:
    from ray.serve.schema import DeploymentSchema

T = TypeVar("T")
A = TypeVar("A", BaseArguments, IngressArguments)

INGRESS_PATH, BASE_PATH = "serve_app.app:ingress", "serve_app.app:base"
FORMER_PATH = "serve_app.app:build"


class ServeFileInvalid(Exception):
    """The file is invalid; `faults` has one line for each reason."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__(*faults)
        self.faults = faults


@dataclass(frozen=True, slots=True)
class ServeFileReport:
    """A valid file: its address, and its Loraplex services."""

    url: str
    applications: tuple[AppConfig, ...]

    @property
    def summary(self) -> list[str]:
        """A short description of each served model."""
        return [f"{base.id} ({base.dtype})" for base in self._bases]

    @property
    def gpus(self) -> tuple[int, int]:
        """How many GPUs all bases need with their fewest replicas, and with their most."""
        most = [(base.autoscaling.max_replicas, base.replica.num_gpus) for base in self._bases]
        return gpus_for(self._fewest), gpus_for(most)

    def longest_wait(self, gpus: int) -> LongestWait | None:
        """Return how long a base without a replica waits at most with so many GPUs; None where one may for ever."""
        return longest_wait(self._fewest, gpus)

    @property
    def _bases(self) -> list[BaseModelConfig]:
        return [base for config in self.applications for base in config.bases]

    @property
    def _fewest(self) -> list[tuple[int, float]]:
        """The fewest replicas of each base, and the GPUs that each of them takes."""
        return [(base.autoscaling.min_replicas, base.replica.num_gpus) for base in self._bases]

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
    return checked(_read(path))


def checked(data: dict[str, Any]) -> ServeFileReport:
    """Return what a Serve file says after checking every key and value of its data.

    Raises:
        ServeFileInvalid: with every fault that was found.
    """
    from ray.serve.schema import ServeDeploySchema

    faults = _unknown_keys(data, ServeDeploySchema, "")
    try:
        schema = ServeDeploySchema.model_validate(data)
    except ValidationError as error:
        raise ServeFileInvalid(faults + faults_of(error, "")) from None
    listed = [
        _Listed(place, one.name, one.import_path, one.args, one.route_prefix, _user_configs(one.deployments))
        for place, one in _placed(schema.applications)
    ]
    applications = _services(listed, faults)
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
            room = next((index for index, left in enumerate(free) if left >= each - LEAST_GPU), None)
            if room is None:
                free.append(1 - each)
            else:
                free[room] -= each
    return whole + len(free)


def timeout_disagreements(config: AppConfig, proxy_timeout_s: float | None) -> list[str]:
    """Return a fault for each two times of a configuration that do not go together; `proxy_timeout_s` is Serve's."""
    limit_s = config.request_timeout_s
    faults: list[str] = []
    if proxy_timeout_s is not None and proxy_timeout_s <= limit_s:
        faults.append(
            f"http_options.request_timeout_s: {proxy_timeout_s:g} s must be over shared.request_timeout_s, "
            f"{limit_s:g} s: callers would get Serve's bare 408 before our error"
        )
    for base in config.bases:
        grace_s, backlog_s = base.replica.graceful_shutdown_timeout_s, base.replica.max_backlog_s
        if grace_s is not None and grace_s < limit_s:
            faults.append(
                f"{base.id}: replica.graceful_shutdown_timeout_s {grace_s:g} s is under shared.request_timeout_s, "
                f"{limit_s:g} s: a scale-down would cut requests off"
            )
        if backlog_s is not None and backlog_s > limit_s:
            faults.append(
                f"{base.id}: replica.max_backlog_s {backlog_s:g} s is over shared.request_timeout_s, {limit_s:g} s: "
                "requests would be accepted that cannot be answered in time"
            )
    return faults


def applications_of(path: Path) -> tuple[AppConfig, ...]:
    """Return the services of a Serve file, without Ray; Serve's own keys are not checked.

    Raises:
        ServeFileInvalid: with every fault that was found.
    """
    listed = _read(path).get("applications")
    if not isinstance(listed, list):
        raise ServeFileInvalid(["applications: is not a list"])
    found = [
        _Listed(
            place,
            one.get("name"),
            one.get("import_path"),
            one.get("args") or {},
            one.get("route_prefix", "/"),
            {each.get("name"): each.get("user_config") or {} for each in one.get("deployments") or []},
        )
        for place, one in _placed(listed)
        if isinstance(one, dict)
    ]
    return _services(found, [])


@dataclass(frozen=True, slots=True)
class _Listed:
    """One application of a file, its values as they are; `user_configs` are those of its deployments."""

    place: str
    name: Any
    import_path: Any
    args: Any
    route_prefix: Any
    user_configs: Mapping[str, Any]


def _placed(applications: Iterable[T]) -> Iterator[tuple[str, T]]:
    return ((f"applications.{index}", one) for index, one in enumerate(applications))


def _user_configs(deployments: list[DeploymentSchema]) -> dict[str, Any]:
    """Return the `user_config` of each deployment that a file gives one."""
    return {one.name: one.user_config for one in deployments if "user_config" in one.model_fields_set}


def _services(listed: Sequence[_Listed], faults: list[str]) -> tuple[AppConfig, ...]:
    """Return the services of the applications listed that are Loraplex's; `faults` are those found before.

    Raises:
        ServeFileInvalid: with every fault that was found.
    """
    faults += [f"{one.place}: {what_to_write_instead(one.args)}" for one in listed if one.import_path == FORMER_PATH]
    bases = {one.name: (one, args) for one, args in _with_arguments(listed, BASE_PATH, BaseArguments, faults)}
    for one, args in bases.values():
        faults += _unusable(args.base, f"{one.place}.args.base")
        if one.route_prefix is not None:
            faults.append(f"{one.place}.route_prefix: must be null: requests come through the ingress alone")
    ingresses = _with_arguments(listed, INGRESS_PATH, IngressArguments, faults)
    if not ingresses and not faults:
        faults.append(f"no application has import_path {INGRESS_PATH}")
    if faults:
        # What is wrong with a base would be told once more, where the ingress refers to it.
        raise ServeFileInvalid(faults)
    services = [_service(one, args, bases, faults) for one, args in ingresses]
    if faults:
        raise ServeFileInvalid(faults)
    served = {base.application_name for service in services for base in service.bases}
    faults += [
        f"{one.place}: no ingress has it among its bases" for name, (one, _) in bases.items() if name not in served
    ]
    if faults:
        raise ServeFileInvalid(faults)
    return tuple(services)


def _service(
    one: _Listed, args: IngressArguments, bases: Mapping[str, tuple[_Listed, BaseArguments]], faults: list[str]
) -> Any:
    """Return the service of an ingress, where nothing is wrong with it."""
    faults += [
        f"{one.place}.deployments: only {INGRESS_NAME} takes a user_config, not {name}"
        for name in one.user_configs
        if name != INGRESS_NAME
    ]
    try:
        service = with_live_settings(args, one.user_configs.get(INGRESS_NAME) or {})
    except ValueError as error:
        faults.append(f"{one.place}.deployments: {INGRESS_NAME}: user_config.{error}")
        return None
    faults += _disagreements(one, args, service, bases)
    faults += [f"{one.place}.deployments: {INGRESS_NAME}: user_config.{fault}" for fault in _unlike_canaries(service)]
    return service


def _with_arguments(listed: Sequence[_Listed], path: str, model: type[A], faults: list[str]) -> list[tuple[_Listed, A]]:
    """Return the applications of an import path whose arguments are valid, with these."""
    found = ((one, _arguments(one, model, faults)) for one in listed if one.import_path == path)
    return [(one, args) for one, args in found if args is not None]


def _arguments(one: _Listed, model: type[A], faults: list[str]) -> A | None:
    try:
        args = model.model_validate(one.args)
        check_tracing(args.shared.tracing)
        check_stores(args.shared.all_stores)
        return args
    except ValidationError as error:
        faults += faults_of(error, f"{one.place}.args.")
    except (TracingUnavailable, StorePackageMissing) as error:
        faults.append(f"{one.place}.args: {error}")
    return None


def _disagreements(
    one: _Listed, args: IngressArguments, service: AppConfig, bases: Mapping[str, tuple[_Listed, BaseArguments]]
) -> list[str]:
    """Return a fault for each thing that an ingress and the applications of its bases do not say alike."""
    faults: list[str] = []
    if args.shared.service != one.name:
        faults.append(f"{one.place}: its name is {one.name}, and args.shared.service '{args.shared.service}'")
    for base in service.bases:
        found = bases.get(base.application_name)
        if found is None:
            faults.append(f"{one.place}: {base.id} is not deployed: add {application_line(base)}")
            continue
        for what, own, other in (("base", base, found[1].base), ("shared", args.shared, found[1].shared)):
            if own != other:
                faults.append(f"{found[0].place}.args.{what}: differs from the ingress'; write it once, as an anchor")
    return faults


def application_line(base: BaseModelConfig) -> str:
    """Return the application of a base as a line of a Serve file whose settings, and the shared ones, are anchors."""
    anchor = base.application_name
    return (
        f"{{name: {anchor}, import_path: '{BASE_PATH}', route_prefix: null, "
        f"args: {{shared: *shared, base: *{anchor}}}}}"
    )


def what_to_write_instead(args: Any) -> str:
    """Return how a file of a former version, with these `args`, is to be changed."""
    given = dict(args) if isinstance(args, dict) else {}
    shared = [name for name in given if name in SharedSettings.model_fields]
    ingress = given.get("ingress")
    if isinstance(ingress, dict) and "request_timeout_s" in ingress:
        shared.append("ingress.request_timeout_s")
    ids = [str(base.get("id")) for base in given.get("bases") or [] if isinstance(base, dict)]
    names = ", ".join(map(serve_name, ids)) or "OWNER--NAME"
    return (
        f"import_path {FORMER_PATH} is gone, since each base is an application of its own now: write {INGRESS_PATH}; "
        f"move {', '.join(shared) or 'what bases share'} from args to 'args: {{shared: &shared {{...}}}}'; "
        f"move bases and default_base to 'deployments: [{{name: {INGRESS_NAME}, user_config: {{...}}}}]', "
        f"each base with an anchor; "
        f"and add an application for each ({names}), such as {{name: OWNER--NAME, import_path: '{BASE_PATH}', "
        "route_prefix: null, args: {shared: *shared, base: *ANCHOR}}. serve_config.yaml is an example"
    )


def _unlike_canaries(service: AppConfig) -> list[str]:
    """Return a fault for each canary whose folder is of another family than its base's, and so would draw nothing."""
    folders = {base.id: base.source.described_by.folder for base in service.bases}
    families = {base: None if folder is None else family_in(folder) for base, folder in folders.items()}
    return [
        f"canaries: {canary.base} draws nothing for {base}: it is {other.name}, not {own.name}"
        for base, canary in service.canaries.items()
        if (own := families[base]) is not None
        and (other := families[canary.base]) is not None
        and own.kind != other.kind
    ]


def _unusable(base: BaseModelConfig, place: str) -> list[str]:
    """Return a fault for each reason why a base cannot be served that its folder or files show, if they are here."""
    folder = base.source.described_by.folder
    reasons = [unusable_reason(folder)] if folder is not None and folder.exists() else []
    reasons += [] if base.quantization is None else [missing_packer(base.quantization)]
    files = [source.file for source in (base.source, *base.part_sources.values())]
    reasons += [unusable_file_reason(file) for file in files if file is not None and file.exists()]
    return [f"{place}: {reason}" for reason in reasons if reason is not None]


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
