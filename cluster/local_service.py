"""A whole service on a cluster of this process: the applications that a Serve file would have, from one mapping.

For tests, benchmarks and `cluster.local_cluster`; on other clusters a service comes from a Serve file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from serve_app.app import base_application, ingress_application
from serve_app.config import AppConfig, BaseArguments, IngressArguments, SharedSettings, serve_name
from serve_app.deployments.ingress.base_handles import deployment_name
from serve_app.deployments.replica.replica import BaseModelReplica

NAME = "loraplex"


def run_service(
    settings: Mapping[str, Any], *, name: str = NAME, replica: Any = BaseModelReplica, waits: bool = True
) -> None:
    """Deploy what `AppConfig` takes, below `/` or else below its name; `replica` is the deployment of each base.

    With `waits`, return once all of it runs.
    """
    bases = [{**base, "application": application_of(base["id"], name)} for base in settings["bases"]]
    config = AppConfig.model_validate({**settings, "bases": bases, "service": name})
    shared = SharedSettings.model_validate({field: getattr(config, field) for field in SharedSettings.model_fields})
    own = {field: getattr(config, field) for field in IngressArguments.model_fields if field != "shared"}
    live = config.model_dump(mode="json", exclude_unset=True, include={"bases", "default_base"})
    ingress = ingress_application(IngressArguments(shared=shared, **own), live)
    targets = [serve.RunTarget(ingress, name=name, route_prefix="/" if name == NAME else f"/{name}")]
    for base in config.bases:
        application = base_application(BaseArguments(shared=shared, base=base), replica)
        targets.append(serve.RunTarget(application, name=base.application_name, route_prefix=None))
    serve.run_many(targets, wait_for_applications_running=waits)


def application_of(base_id: str, service: str = NAME) -> str:
    """Return the application of a base in a service that was deployed so."""
    return f"{service}-{serve_name(base_id)}"


def delete_service(name: str) -> None:
    """Delete a service that was deployed so."""
    for application in serve.status().applications:
        if application == name or application.startswith(f"{name}-"):
            serve.delete(application)


def base_handle(base_id: str, service: str = NAME) -> DeploymentHandle:
    """Return the way to the replicas of a base in a service that was deployed so."""
    return serve.get_deployment_handle(deployment_name(base_id), application_of(base_id, service))
