"""The composition root: one Ray application from one configuration.

Owns how the parts are put together; the environment is read here, by `environment`, and handed down. `serve run` and
Serve config files name `serve_app.app:build`.
"""
# No `from __future__ import annotations` here: Serve reads the annotation of `build` to make the pydantic model.

from typing import Any

from ray.serve import Application

from serve_app.autoscaling import ray_settings
from serve_app.catalog.sources.bucket import check_stores
from serve_app.config import AppConfig, BaseModelConfig, Environment, IngressSettings
from serve_app.deployments.front.own_routes import INGRESS_NAME
from serve_app.deployments.ingress.backpressure import most_held
from serve_app.deployments.ingress.ingress import Ingress, deployment_name
from serve_app.deployments.registry.keeper import Keeper
from serve_app.deployments.replica.replica import BaseModelReplica
from serve_app.environment import read_environment
from serve_app.observability.tracing import check_tracing
from serve_app.routing.router import router_config

# Ray gives the head node, and no other, one of this.
HEAD_NODE = "node:__internal_head__"
# Each ingress replica has one question open with the keeper, and each replica one for each file that another fetches.
KEEPER_MAX_ONGOING = 10_000
KEEPER_SHUTDOWN_S = 5.0
MAX_QUEUED_IN_PROXY = 1000


def build(config: AppConfig) -> Application:
    """Return the application: one ingress deployment, and one deployment per configured base."""
    return assemble(config, BaseModelReplica)


def assemble(config: AppConfig, replica: Any) -> Application:
    """Return the application with `BaseModelReplica`, or a deployment like it, for each base."""
    check_tracing(config.tracing)
    check_stores(config.adapters.stores)
    environment = read_environment(config)
    keeper = _keeper_deployment(config, environment)
    handles = {base.id: _base_deployment(replica, base, config, environment, keeper) for base in config.bases}
    ingress = config.ingress
    return Ingress.options(
        name=INGRESS_NAME,
        **_number_of(ingress),
        max_replicas_per_node=ingress.max_replicas_per_node,
        max_ongoing_requests=ingress.max_ongoing_requests + most_held(config),
        # Requests that wait for bases must not block health checks and refusals. Requests that find all replicas
        # full wait in the proxy; those for images are refused before that.
        max_queued_requests=MAX_QUEUED_IN_PROXY,
        backpressure_config={"status_code": 429, "retry_after_s": 1.0},
        ray_actor_options={"num_cpus": ingress.num_cpus, "resources": ingress.resources},
        health_check_period_s=ingress.health_check_period_s,
        health_check_timeout_s=ingress.health_check_timeout_s,
        # Longer than the longest request, or a scale-down would cut requests off.
        graceful_shutdown_timeout_s=ingress.request_timeout_s,
    ).bind(config, environment, handles, keeper)


def _number_of(ingress: IngressSettings) -> dict[str, Any]:
    if ingress.autoscaling is None:
        return {"num_replicas": ingress.replicas}
    return {"autoscaling_config": ingress.autoscaling.model_dump(exclude_none=True)}


def _keeper_deployment(config: AppConfig, environment: Environment) -> Application:
    # Its file must be where the next keeper looks for it: on the head node.
    return Keeper.options(
        max_ongoing_requests=KEEPER_MAX_ONGOING,
        ray_actor_options={"num_cpus": 0, "resources": {HEAD_NODE: 0.001}},
        graceful_shutdown_timeout_s=KEEPER_SHUTDOWN_S,
        health_check_period_s=5.0,
    ).bind(config, environment)


def _base_deployment(
    kind: Any, base: BaseModelConfig, config: AppConfig, environment: Environment, keeper: Application
) -> Application:
    replica = base.replica
    return kind.options(
        name=deployment_name(base.id),
        max_ongoing_requests=replica.max_ongoing_requests,
        max_queued_requests=replica.max_queued_requests,
        autoscaling_config=ray_settings(base.autoscaling),
        ray_actor_options={
            "num_cpus": replica.num_cpus,
            "num_gpus": replica.num_gpus,
            "resources": replica.resources,
        },
        max_replicas_per_node=replica.max_replicas_per_node,
        request_router_config=router_config(base, config),
        health_check_period_s=replica.health_check_period_s,
        health_check_timeout_s=replica.health_check_timeout_s,
        graceful_shutdown_timeout_s=replica.graceful_shutdown_timeout_s or config.ingress.request_timeout_s,
    ).bind(base, config, environment, keeper)
