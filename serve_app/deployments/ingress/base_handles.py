"""The ways from one ingress replica to the applications of the bases, which come, change and go while it runs.

Owns that a base which went and came back is asked through a new handle.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from ray.serve.handle import DeploymentHandle

from serve_app.config import BaseModelConfig, serve_name
from serve_app.deployments.registry.replica_counts import Place


def deployment_name(base_id: str) -> str:
    """Return the Serve deployment that serves a base."""
    return "base-" + serve_name(base_id)


class BaseHandles(Mapping[str, DeploymentHandle]):
    """A handle for each base, whether or not its application is there; calls wait until it is.

    Bases that are served no more stay known, for what is still with them.
    """

    def __init__(self) -> None:
        self._handles: dict[str, DeploymentHandle] = {}

    def add(self, bases: Iterable[BaseModelConfig]) -> None:
        """Know these bases too. A handle that is known is kept, unless its base has moved to another application."""
        for base in bases:
            known = self._handles.get(base.id)
            if known is None or known.app_name != base.application_name:
                # `get_deployment_handle` refuses what is not there yet, and gives one that is known again.
                self._handles[base.id] = DeploymentHandle(deployment_name(base.id), base.application_name)

    def renew(self, base_id: str, used: DeploymentHandle) -> None:
        """Have a base asked through a new handle, if that is still the one in use.

        Serve tells a handle that its application was deleted, but that there is another of its name only once a
        replica of that runs, which for a base at zero takes a request.
        """
        if self._handles[base_id] is used:
            self._handles[base_id] = DeploymentHandle(used.deployment_name, used.app_name)

    def places(self) -> Mapping[str, Place]:
        """Return where each base is deployed; from any thread."""
        return {base: Place(one.app_name, one.deployment_name) for base, one in list(self._handles.items())}

    def __getitem__(self, base_id: str) -> DeploymentHandle:
        return self._handles[base_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._handles)

    def __len__(self) -> int:
        return len(self._handles)
