"""Settings that a running service takes over: what callers see changes, and no process starts again."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from serve_app.config import digest_of
from serve_app.deployments.front.own_routes import INGRESS_NAME
from tests.faults.breaking import until
from tests.service import Service, base_settings, processes_of
from tests.written_files import logs

NAME = "live"
KEY = "a-key-of-the-test"
PAGE = "https://pages.example"
REFUSED = b"not taken over, the settings before hold on: ingress.replicas: goes into args"


class Deployed:
    """A service from a Serve file, whose ingress can be given another `user_config`."""

    def __init__(self, port: int, cache: Path) -> None:
        self.service = Service(f"http://127.0.0.1:{port}/{NAME}")
        self._args = {
            "bases": [base_settings("demo/sd15")],
            "adapters": {"embedded": True, "hub": {"enabled": False}},
            "ingress": {"replicas": 1, "num_cpus": 0.1},
            "cache_dir": str(cache),
        }

    def deploy(self, user_config: dict[str, Any]) -> None:
        """Do what `serve deploy` does with the file."""
        application = {
            "name": NAME, "route_prefix": f"/{NAME}", "import_path": "serve_app.app:build", "args": self._args,
            "deployments": [{"name": INGRESS_NAME, "user_config": user_config}],
        }  # fmt: skip
        client = _get_global_client()
        assert client is not None, "Serve runs"
        client.deploy_apps(ServeDeploySchema.model_validate({"applications": [application]}))

    def allowed(self) -> str | None:
        """Return the page that may read the service's answers, None where this one may not."""
        return self.service.http.get("/health", headers={"origin": PAGE}).headers.get("access-control-allow-origin")

    @property
    def processes(self) -> set[int]:
        return {process.pid for process in processes_of(f"ServeReplica:{NAME}:")}


@pytest.fixture
def deployed(cluster: int, tmp_path: Path) -> Iterator[Deployed]:
    running = Deployed(cluster, tmp_path / "cache")
    yield running
    serve.delete(NAME)


def test_limits_origins_and_keys_change_under_load_and_no_replica_starts_again(deployed: Deployed) -> None:
    deployed.deploy({"ingress": {"max_body": "1KiB"}})
    service, statuses, is_over = deployed.service, Counter[int](), threading.Event()
    until(lambda: service.http.get("/health").status_code == 200, "ready")
    assert service.ask("a star" + " " * 2000).status_code == 413
    before = deployed.processes
    assert len(before) == 3, "an ingress, a base and the keeper"

    def ask_on() -> None:
        caller = Service(service.url)
        caller.http.headers["authorization"] = f"Bearer {KEY}"
        while not is_over.is_set():
            statuses[caller.ask("a star", seed=1, num_inference_steps=2).status_code] += 1

    asking = threading.Thread(target=ask_on)
    asking.start()
    try:
        until(lambda: statuses[200] > 0, "an image")
        deployed.deploy({"ingress": {"cors_origins": [PAGE]}})
        until(lambda: deployed.allowed() == PAGE, "the new origin")
        assert service.ask("a star" + " " * 2000, num_inference_steps=2).status_code == 200, "args' limit again"

        deployed.deploy({"ingress": {"cors_origins": [], "replicas": 7}})
        until(lambda: any(REFUSED in log for log in logs(f"*{NAME}_{INGRESS_NAME}*").values()), "the refusal")
        assert deployed.allowed() == PAGE
        key = {"name": "ops", "sha256": digest_of(KEY)}
        deployed.deploy({"ingress": {"cors_origins": [PAGE]}, "auth": {"keys": [key]}})
        until(lambda: service.ask("a star", num_inference_steps=2).status_code == 401, "the key")
        assert deployed.allowed() == PAGE
        drawn = statuses[200]
        until(lambda: statuses[200] > drawn, "an image for the key")
    finally:
        is_over.set()
        asking.join()
    assert set(statuses) == {200}
    assert deployed.processes == before
