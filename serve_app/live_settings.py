"""What of a service can change while its ingress runs: the `user_config` of the ingress deployment.

Owns which settings these are: the bases, and some of its own. Serve hands a `user_config` that has changed to the
running replicas of its deployment, and restarts none; a change of `args` restarts every replica of the application.
Canaries are apart from the bases, whose settings are also the `args` of their applications: a change of a share is to
restart none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from serve_app.config import AppConfig, IngressArguments
from serve_app.settings import StrictModel, faults_of, nearest

BASES = ("bases", "default_base", "canaries")
# By section; all else is read when a replica starts.
LIVE_SETTINGS: Mapping[str, frozenset[str]] = {
    "ingress": frozenset({
        "max_body", "max_json", "body_timeout_s", "sse_ping_interval_s", "draw_pictures", "cors_origins", "hosts",
        "unknown_ids_per_minute",
    }),
    "auth": frozenset({"keys", "keys_file"}),
}  # fmt: skip


def with_live_settings(arguments: IngressArguments, user_config: Mapping[str, Any]) -> AppConfig:
    """Return the whole configuration: `args` with the settings of the `user_config`, in the same form, over its own.

    Raises:
        ValueError: what is missing, unknown, not valid, or needs a restart.
    """
    sections: dict[str, StrictModel] = {}
    for name, changes in user_config.items():
        if name in BASES:
            continue
        if name not in AppConfig.model_fields:
            raise ValueError(f"{name}: unknown key{nearest(name, [*BASES, *LIVE_SETTINGS])}")
        if name not in LIVE_SETTINGS:
            live = ", ".join((*BASES, *LIVE_SETTINGS))
            raise ValueError(f"{name}: goes into args; without a restart change {live}")
        if not isinstance(changes, Mapping):
            raise ValueError(f"{name}: is not a mapping of settings")
        section: StrictModel = getattr(arguments, name)
        try:
            sections[name] = type(section).model_validate({**section.model_dump(exclude_unset=True), **changes})
        except ValidationError as error:
            raise ValueError("; ".join(faults_of(error, f"{name}."))) from None
        fixed = sorted(set(changes) - LIVE_SETTINGS[name])
        if fixed:
            live = ", ".join(sorted(LIVE_SETTINGS[name]))
            raise ValueError(f"{name}.{fixed[0]}: goes into args; without a restart change {live}")
    served = {name: user_config[name] for name in BASES if name in user_config}
    own = {name: value for name, value in arguments if name != "shared"}
    try:
        config = AppConfig.model_validate({**dict(arguments.shared), **own, **sections, **served})
    except ValidationError as error:
        # What is wrong with the whole has no place.
        raise ValueError("; ".join(fault.removeprefix(": ") for fault in faults_of(error, ""))) from None
    _check_canaries(config)
    return config


def _check_canaries(config: AppConfig) -> None:
    """Refuse canaries that could not draw for their bases, or would for others.

    Raises:
        ValueError: for the first of them.
    """
    bases = {base.id: base for base in config.bases}
    canaries = [canary.base for canary in config.canaries.values()]
    for original, canary in config.canaries.items():
        for name in (original, canary.base):
            if name not in bases:
                raise ValueError(f"canaries: '{name}' is not the id of a base{nearest(name, list(bases))}")
        if canary.base in config.canaries:
            raise ValueError(f"canaries: {canary.base} has a canary, and cannot be one")
        if canaries.count(canary.base) > 1:
            raise ValueError(f"canaries: {canary.base} is the canary of two bases")
        if canary.base == config.default.id:
            raise ValueError(f"canaries: {canary.base} is the default base; name another as default_base")
        if not bases[canary.base].autoscaling.min_replicas:
            raise ValueError(
                f"canaries: {canary.base} needs min_replicas of 1 or more: at zero it draws nothing, and nothing "
                "starts it"
            )
