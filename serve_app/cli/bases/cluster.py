"""A Ray cluster by the REST API of its dashboard: what Serve runs there, and a deployment.

Owns the calls and what their failures say.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
from ray.exceptions import RayError

from serve_app.cli.terminal import CommandFailed


class Cluster:
    """A running cluster.

    Raises:
        CommandFailed: no cluster answers at the address, or it refuses; so do all methods.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        with self._failures():
            self._client = ServeSubmissionClient(address)

    def details(self) -> dict[str, Any]:
        """Return what Serve says of its applications."""
        with self._failures():
            return self._client.get_serve_details()

    def deploy(self, serve_file: Mapping[str, Any]) -> None:
        """Have Serve carry out a file, as `serve deploy` does; it returns before that is done."""
        with self._failures():
            self._client.deploy_applications(dict(serve_file))

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except ConnectionError:
            raise CommandFailed(
                f"no Ray cluster answers at {self._address}; --address names another", "unreachable"
            ) from None
        # `requests` raises OSErrors, Ray's client the others; something else than Ray may answer.
        except (OSError, RuntimeError, RayError, KeyError, TypeError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise CommandFailed(f"the cluster at {self._address} refuses: {lines[-1]}", "cluster_failed") from None
