"""The composition root: the Ray applications of one service, one for its ingress and one for each base.

Owns how the parts are put together; the environment is read here, by `environment`, and handed down. `serve run` and
Serve config files name `serve_app.app:ingress` and `serve_app.app:base`.
"""
# No `from __future__ import annotations` here: Serve reads the annotations of both to make the pydantic models.

from collections.abc import Mapping
from typing import Any

from ray.serve import Application

from serve_app.autoscaling.policy import ray_settings
from serve_app.catalog.sources.bucket import check_stores
from serve_app.config import (
    BaseArguments,
    Environment,
    IngressArguments,
    IngressSettings,
    SharedSettings,
)
from serve_app.deployments.front.own_routes import INGRESS_NAME
from serve_app.deployments.ingress.base_handles import deployment_name
from serve_app.deployments.ingress.ingress import Ingress
from serve_app.deployments.registry.keeper import KEEPER_NAME, Keeper
from serve_app.deployments.replica.replica import BaseModelReplica
from serve_app.environment import read_environment
from serve_app.observability.tracing import check_tracing
from serve_app.routing.router import router_config
from serve_app.settings import RegistrySettings

# Ray gives the head node, and no other, one of this.
HEAD_NODE = "node:__internal_head__"
# Each ingress replica has one question open with the keeper, and each replica one for each file that another fetches.
KEEPER_MAX_ONGOING = 10_000
KEEPER_SHUTDOWN_S = 5.0
MAX_QUEUED_IN_PROXY = 1000
# Bases come while the ingress runs, so it has places for the requests that wait for more of them than there are; how
# many may wait is for the bases to say.
MAX_HELD = 10_000


def ingress(args: IngressArguments) -> Application:
    """Return the application of the HTTP face; the bases are in the `user_config` of its deployment."""
    return ingress_application(args)


def base(args: BaseArguments) -> Application:
    """Return the application of one base."""
    return base_application(args, BaseModelReplica)


def ingress_application(args: IngressArguments, user_config: Mapping[str, Any] | None = None) -> Application:
    """Return the application of the HTTP face with a `user_config`, where no Serve file brings one."""
    environment = _environment_of(args.shared, args.registry)
    settings = args.ingress
    return Ingress.options(
        name=INGRESS_NAME,
        **_number_of(settings),
        **({} if user_config is None else {"user_config": dict(user_config)}),
        max_replicas_per_node=settings.max_replicas_per_node,
        max_ongoing_requests=settings.max_ongoing_requests + MAX_HELD,
        # Requests that wait for bases must not block health checks and refusals. Requests that find all replicas
        # full wait in the proxy; those for images are refused before that.
        max_queued_requests=MAX_QUEUED_IN_PROXY,
        backpressure_config={"status_code": 429, "retry_after_s": 1.0},
        ray_actor_options={"num_cpus": settings.num_cpus, "resources": settings.resources},
        health_check_period_s=settings.health_check_period_s,
        health_check_timeout_s=settings.health_check_timeout_s,
        # Longer than the longest request, or a scale-down would cut requests off.
        graceful_shutdown_timeout_s=args.shared.request_timeout_s,
    ).bind(args, environment, _keeper_deployment(args, environment))


def base_application(args: BaseArguments, kind: Any) -> Application:
    """Return the application of one base with `BaseModelReplica`, or a deployment like it."""
    environment = _environment_of(args.shared)
    replica = args.base.replica
    return kind.options(
        name=deployment_name(args.base.id),
        max_ongoing_requests=replica.max_ongoing_requests,
        max_queued_requests=replica.max_queued_requests,
        autoscaling_config=ray_settings(args.base.autoscaling, gpus=replica.num_gpus),
        ray_actor_options={
            "num_cpus": replica.num_cpus,
            "num_gpus": replica.num_gpus,
            "resources": replica.resources,
        },
        max_replicas_per_node=replica.max_replicas_per_node,
        request_router_config=router_config(args.base),
        health_check_period_s=replica.health_check_period_s,
        health_check_timeout_s=replica.health_check_timeout_s,
        graceful_shutdown_timeout_s=replica.graceful_shutdown_timeout_s or args.shared.request_timeout_s,
    ).bind(args.base, args.shared, environment)


def _environment_of(shared: SharedSettings, registry: RegistrySettings | None = None) -> Environment:
    check_tracing(shared.tracing)
    check_stores(shared.all_stores)
    return read_environment(shared, registry)


def _number_of(settings: IngressSettings) -> dict[str, Any]:
    if settings.autoscaling is None:
        return {"num_replicas": settings.replicas}
    return {"autoscaling_config": settings.autoscaling.model_dump(exclude_none=True)}


def _keeper_deployment(args: IngressArguments, environment: Environment) -> Application:
    # Its file must be where the next keeper looks for it: on the head node.
    return Keeper.options(
        name=KEEPER_NAME,
        max_ongoing_requests=KEEPER_MAX_ONGOING,
        ray_actor_options={"num_cpus": 0, "resources": {HEAD_NODE: 0.001}},
        graceful_shutdown_timeout_s=KEEPER_SHUTDOWN_S,
        health_check_period_s=5.0,
    ).bind(args.shared, args.registry, environment)
