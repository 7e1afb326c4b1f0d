"""What of a configuration can change while the service runs: the `user_config` of the ingress deployment.

Owns which settings these are. Serve hands a `user_config` that has changed to the running replicas of its deployment,
and restarts none; a change of `args` restarts every replica of the application.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from serve_app.config import AppConfig
from serve_app.settings import StrictModel, faults_of

# By section; all else is read when a replica starts.
LIVE_SETTINGS: Mapping[str, frozenset[str]] = {
    "ingress": frozenset({
        "max_body", "max_json", "body_timeout_s", "sse_ping_interval_s", "draw_pictures", "cors_origins", "hosts",
        "unknown_ids_per_minute",
    }),
    "auth": frozenset({"keys", "keys_file"}),
}  # fmt: skip


def with_live_settings(config: AppConfig, user_config: Mapping[str, Any]) -> AppConfig:
    """Return a configuration with the settings of the ingress' `user_config`, in the form of `args`, over its own.

    Raises:
        ValueError: what is unknown, not valid, or needs a restart.
    """
    sections: dict[str, StrictModel] = {}
    for name, changes in user_config.items():
        if name not in LIVE_SETTINGS:
            raise ValueError(f"{name}: goes into args; only {' and '.join(LIVE_SETTINGS)} change without a restart")
        if not isinstance(changes, Mapping):
            raise ValueError(f"{name}: is not a mapping of settings")
        section: StrictModel = getattr(config, name)
        try:
            sections[name] = type(section).model_validate({**section.model_dump(exclude_unset=True), **changes})
        except ValidationError as error:
            raise ValueError("; ".join(faults_of(error, f"{name}."))) from None
        fixed = sorted(set(changes) - LIVE_SETTINGS[name])
        if fixed:
            live = ", ".join(sorted(LIVE_SETTINGS[name]))
            raise ValueError(f"{name}.{fixed[0]}: goes into args; without a restart change {live}")
    return config.model_copy(update=sections)
