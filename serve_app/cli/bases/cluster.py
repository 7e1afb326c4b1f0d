"""A Ray cluster by the REST API of its dashboard: what Serve runs there, and a deployment.

Owns the calls and what their failures say.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
from ray.exceptions import RayError
from requests import Timeout

from serve_app.cli.terminal import CommandFailed

TIMEOUT_S = 60.0


class _Client(ServeSubmissionClient):
    """Ray's client, which by itself waits for ever."""

    def __init__(self, address: str, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        super().__init__(address)

    def _do_request(self, *what: Any, **options: Any) -> Any:
        return super()._do_request(*what, timeout=self._timeout_s, **options)


class Cluster:
    """A running cluster.

    Raises:
        CommandFailed: no cluster answers at the address, or it refuses; so do all methods.
    """

    def __init__(self, address: str, *, timeout_s: float = TIMEOUT_S) -> None:
        self._address, self._timeout_s = address, timeout_s
        with self._failures():
            self._client = _Client(address, timeout_s)

    def details(self) -> dict[str, Any]:
        """Return what Serve says of its applications."""
        with self._failures():
            return self._client.get_serve_details()

    def deploy(self, serve_file: Mapping[str, Any]) -> None:
        """Have Serve carry out a file, as `serve deploy` does; it returns before that is done."""
        with self._failures("; it may still carry out what was sent"):
            self._client.deploy_applications(dict(serve_file))

    @contextmanager
    def _failures(self, after_timeout: str = "; --address names another") -> Iterator[None]:
        try:
            yield
        except Timeout:
            said = f"{self._address} accepts and has not answered within {self._timeout_s:g} s{after_timeout}"
            raise CommandFailed(said, "unreachable") from None
        except ConnectionError:
            raise CommandFailed(
                f"no Ray cluster answers at {self._address}; --address names another", "unreachable"
            ) from None
        # `requests` raises OSErrors, Ray's client the others; something else than Ray may answer.
        except (OSError, RuntimeError, RayError, KeyError, TypeError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise CommandFailed(f"the cluster at {self._address} refuses: {lines[-1]}", "cluster_failed") from None
