"""The loss of the head node where what it knows lies in Redis: Ray's record of the cluster, and the aliases."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from cluster.local_cluster import ISOLATION
from cluster.ports import free_port
from serve_app.deployments.front.own_routes import INGRESS_NAME
from tests.faults.breaking import kill, replica_pids, until
from tests.redis_server import Redis, needs_redis
from tests.serve_files import applications
from tests.service import Service, base_settings

RAY = (sys.executable, "-m", "ray.scripts.scripts")
NIGHT = "demo/sd15-night"

pytestmark = [pytest.mark.timeout(900), needs_redis]


class Nodes:
    """A head without room for replicas and one worker, each started as `ray start` does on a machine of its own."""

    def __init__(self, home: Path, redis: Redis) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        self._home = home
        self._address = f"127.0.0.1:{free_port()}"
        self._environment = os.environ | ISOLATION | {
            "HOME": str(home), "OMP_NUM_THREADS": "1", "RAY_REDIS_ADDRESS": f"127.0.0.1:{redis.port}",
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "LORAPLEX_REGISTRY_REDIS": f"redis://127.0.0.1:{redis.port}/1",
        }  # fmt: skip

    @contextmanager
    def head(self, name: str) -> Iterator[int]:
        """Run a head with an empty disk; yield the process whose descendants it is made of."""
        port = self._address.rpartition(":")[2]
        arguments = ("--head", "--port", port, "--num-cpus", "0", "--include-dashboard", "false")
        with self._node(name, *arguments, "--temp-dir", str(self._home / name)) as pid:
            until(lambda: self._run(*RAY, "health-check", "--address", self._address) == 0, "the head")
            yield pid

    @contextmanager
    def worker(self) -> Iterator[int]:
        """Run a worker node."""
        with self._node("worker", "--address", self._address, "--num-cpus", "4") as pid:
            yield pid

    def deploy(self, service: dict[str, Any]) -> None:
        """Deploy a service, as `serve run` does, and leave it running."""
        port = int(self.url.rpartition(":")[2])
        file = self._home / "serve.yaml"
        file.write_text(
            yaml.safe_dump(
                {
                    "proxy_location": "EveryNode",
                    "http_options": {"host": "127.0.0.1", "port": port},
                    "applications": applications(service),
                }
            )
        )
        run = (sys.executable, "-m", "ray.serve.scripts", "run", "--non-blocking", "--address", self._address)
        assert self._run(*run, str(file)) == 0, (self._home / "commands.log").read_text()

    def _run(self, *command: str) -> int:
        with (self._home / "commands.log").open("a") as log:
            return subprocess.run(
                command, env=self._environment, stdout=log, stderr=log, timeout=300, check=False
            ).returncode

    @contextmanager
    def _node(self, name: str, *arguments: str) -> Iterator[int]:
        command = (*RAY, "start", *arguments, "--node-ip-address", "127.0.0.1", "--block")
        with (self._home / f"{name}.log").open("w") as log:
            process = subprocess.Popen(command, env=self._environment, stdout=log, stderr=log)
        try:
            yield process.pid
        finally:
            kill_node(process.pid)
            process.wait()


def kill_node(pid: int) -> None:
    """End everything of a node at once, without a word to anybody."""
    if psutil.pid_exists(pid):
        node = psutil.Process(pid)
        for part in [node, *node.children(recursive=True)]:
            kill(part.pid)


def settings(cache: Path) -> dict[str, Any]:
    return {
        "bases": [base_settings("demo/sd15")],
        "adapters": {"embedded": True, "hub": {"enabled": False}},
        "ingress": {"replicas": 1, "num_cpus": 0.1},
        "cache_dir": str(cache / "{node}"),
    }


@pytest.fixture
def home() -> Iterator[Path]:
    """A folder whose path is short: Ray puts sockets below it."""
    with tempfile.TemporaryDirectory(prefix="loraplex-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def test_an_alias_is_there_after_the_head_was_killed_and_no_replica_starts_again(home: Path) -> None:
    redis = Redis()
    nodes = Nodes(home, redis)
    service = Service(nodes.url)

    def answers(ask: Callable[[], httpx.Response]) -> bool:
        try:
            return ask().is_success
        except httpx.TransportError:  # the head's proxy had the connection
            return False

    def draws() -> bool:
        return answers(lambda: service.ask("a star", lora="mine", num_inference_steps=2))

    def makes_an_alias(name: str) -> bool:
        return answers(lambda: service.http.post("/v1/loras", json={"lora_name": name, "source": {"uri": NIGHT}}))

    try:
        with nodes.head("head") as head, nodes.worker():
            nodes.deploy(settings(home / "cache"))
            until(lambda: makes_an_alias("mine"), "the service")
            until(draws, "an image")
            on_worker = replica_pids(INGRESS_NAME).keys() | replica_pids("base-").keys()
            assert len(on_worker) == 2
            kill_node(head)
            until(draws, "an image without a head")
            with nodes.head("head-again"):
                until(lambda: makes_an_alias("other"), "the keeper on the new head")
                aliases = {row["id"] for row in service.http.get("/v1/loras").json()["data"] if row["alias_of"]}
                assert aliases == {"mine", "other"}
                assert draws()
                assert on_worker == replica_pids(INGRESS_NAME).keys() | replica_pids("base-").keys()
    finally:
        redis.stop()
