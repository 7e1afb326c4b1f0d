"""The composition root: one Ray application from one configuration.

Owns how the parts are put together, and is the only reader of the process environment. `serve run` and Serve config
files name `serve_app.app:build`.
"""
# No `from __future__ import annotations` here: Serve reads the annotation of `build` to make the pydantic model.

import os
from pathlib import Path

from pydantic import SecretStr
from ray.serve import Application

from serve_app.config import AppConfig, BaseModelConfig, Environment
from serve_app.deployments.ingress import Ingress, deployment_name
from serve_app.deployments.replica import BaseModelReplica

# One Serve worker restart should not take every replica of a base with it.
MAX_SURGE_PERCENT = 25


def read_environment(config: AppConfig) -> Environment:
    """Return what the process environment says, the configuration's own words first."""
    token = os.environ.get("HF_TOKEN")
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Environment(
        hub_token=SecretStr(token) if token else None,
        hub_endpoint=config.adapters.hub.endpoint or os.environ.get("HF_ENDPOINT") or None,
        cache_dir=config.cache_dir or cache_home / "loraplex",
    )


def launch_environment() -> dict[str, str]:
    """Return the environment that `loraplex serve` starts `serve run` with: this one, usage reports off."""
    return {"RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_DISABLE_TELEMETRY": "1", **os.environ}


def build(config: AppConfig) -> Application:
    """Return the application: one ingress deployment, and one deployment per configured base."""
    environment = read_environment(config)
    handles = {base.id: _base_deployment(base, config, environment) for base in config.bases}
    ingress = config.ingress
    return Ingress.options(
        num_replicas=ingress.replicas,
        max_ongoing_requests=ingress.max_ongoing_requests,
        ray_actor_options={"num_cpus": ingress.num_cpus},
        # Longer than the longest request, or a scale-down would cut requests off.
        graceful_shutdown_timeout_s=ingress.request_timeout_s,
    ).bind(config, environment, handles)


def _base_deployment(base: BaseModelConfig, config: AppConfig, environment: Environment) -> Application:
    replica = base.replica
    return BaseModelReplica.options(
        name=deployment_name(base.id),
        max_ongoing_requests=replica.max_ongoing_requests,
        max_queued_requests=replica.max_queued_requests,
        autoscaling_config=base.autoscaling.model_dump(exclude_none=True),
        ray_actor_options={"num_cpus": replica.num_cpus, "num_gpus": replica.num_gpus},
        health_check_period_s=replica.health_check_period_s,
        graceful_shutdown_timeout_s=replica.graceful_shutdown_timeout_s,
    ).bind(base, config, environment)
