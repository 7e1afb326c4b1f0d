"""Several Ray nodes on one machine: `python -m cluster.local_cluster --nodes 4` prints what to try.

Owns the life of the nodes, each a real raylet with a store of its own and as many GPUs as it is told to claim: Ray
counts them, nothing computes on them. For trying scale-out, the loss of a node and upgrades before they happen. Must
not know what is served.
"""

from __future__ import annotations

import argparse
import os
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import ray
from ray import serve
from ray._private.authentication_test_utils import reset_auth_token_state, set_auth_mode, set_env_auth_token
from ray.cluster_utils import Cluster
from ray.serve._private.router import SingletonThreadRouter

from cluster.ports import free_port
from cluster.processes import command_line

OBJECT_STORE_BYTES = 128 * 1024**2
JOIN_S = 120.0
THREAD_END_S = 30.0
# On a machine that does other things too.
BUSY_MACHINE = {
    # Ray's workers give way to everything else on the machine, and then the nodes take each other for dead.
    "RAY_worker_niceness": "0",
    # Nodes and proxies take their time to start.
    "RAY_raylet_start_wait_time_s": "180",
    "RAY_agent_register_timeout_ms": "180000",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
}
ISOLATION = {
    **BUSY_MACHINE,
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SCHEDULER_EVENTS": "0",
    # Else a metric takes ten seconds to be seen.
    "RAY_metrics_report_interval_ms": "1000",
}


@dataclass(frozen=True, slots=True)
class NodeShape:
    """What one node claims to have, and what its processes have in their environment besides."""

    cpus: float = 1
    gpus: float = 0
    resources: Mapping[str, float] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)

    def arguments(self) -> dict[str, Any]:
        """Return the shape as Ray's own arguments."""
        return {
            "num_cpus": self.cpus,
            "num_gpus": self.gpus,
            "resources": dict(self.resources),
            "object_store_memory": OBJECT_STORE_BYTES,
            "env_vars": dict(self.environment),
        }


class LocalCluster:
    """A head without room for replicas, and worker nodes that come and go.

    `proxies` says where Serve's proxies are: "HeadOnly", or "EveryNode" that has a replica. All of a machine's share
    one port, among which the kernel spreads connections.
    """

    def __init__(self, *, port: int, proxies: str = "HeadOnly") -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._port = port
        self._proxies = proxies
        self._cluster = Cluster()
        self._nodes: dict[str, Any] = {}

    def start(self) -> None:
        """Start the head, and Serve on it."""
        self._cluster.add_node(**NodeShape(cpus=0).arguments(), include_dashboard=False)
        ray.init(address=self._cluster.address, log_to_driver=False)
        serve.start(proxy_location=self._proxies, http_options={"host": "127.0.0.1", "port": self._port})

    @property
    def nodes(self) -> tuple[str, ...]:
        """The ids of the worker nodes, oldest first."""
        return tuple(self._nodes)

    def grow(self, workers: int, shape: NodeShape) -> tuple[str, ...]:
        """Start some worker nodes, wait until all have joined, and return their ids."""
        added = [self._cluster.add_node(wait=False, **shape.arguments()) for _ in range(workers)]
        self._nodes |= {str(node.node_id): node for node in added}
        ids = tuple(str(node.node_id) for node in added)
        _wait_until_alive(frozenset(ids))
        return ids

    def kill(self, node_id: str) -> None:
        """End a node and all that runs on it, without a word to anybody."""
        self._cluster.remove_node(self._nodes.pop(node_id), allow_graceful=False)

    def drain(self, node_id: str, *, within_s: int) -> None:
        """Tell Serve that a node goes, as the pods of `cluster/kuberay` do before they end; it ends once it is idle."""
        command = [
            sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", self._cluster.address,
            "--node-id", node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "the node goes",
            "--deadline-remaining-seconds", str(within_s),
        ]  # fmt: skip
        subprocess.run(command, check=True)
        self._nodes.pop(node_id)

    def metrics(self) -> str:
        """Return what Prometheus would read from all nodes now."""
        ports = [node["MetricsExportPort"] for node in ray.nodes() if node["Alive"]]
        host = ray.util.get_node_ip_address()
        with httpx.Client(timeout=10, trust_env=False) as http:
            texts: list[str] = []
            for port in ports:
                # A node that was just lost is taken for alive a little longer.
                with suppress(httpx.TransportError):
                    texts.append(http.get(f"http://{host}:{port}/metrics").text)
        return "\n".join(texts)

    def close(self) -> None:
        """End everything, as much of it as there is."""
        shut_down()
        self._cluster.shutdown()


def shut_down() -> None:
    """End Serve and Ray as this process uses them, in this order, and the thread in which Serve's handles route.

    Ray leaves that thread running: it would call a core worker that is gone, and the interpreter die over it at exit.
    """
    if not ray.is_initialized():  # Serve would start a Ray of its own to shut down
        return
    serve.shutdown()
    loop, SingletonThreadRouter._asyncio_loop = SingletonThreadRouter._asyncio_loop, None
    if loop is not None:
        loop.call_soon_threadsafe(loop.stop)
    for thread in threading.enumerate():
        if "_run_router_event_loop" in thread.name:
            thread.join(THREAD_END_S)
    ray.shutdown()


def alive_nodes() -> set[str]:
    """Return the ids of the nodes that Ray takes for alive."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def _wait_until_alive(node_ids: frozenset[str]) -> None:
    """Return once nodes have joined, even if Ray has not noticed that others were lost.

    Raises:
        TimeoutError: they have not joined within `JOIN_S`.
    """
    until = time.monotonic() + JOIN_S
    while not node_ids <= alive_nodes():
        if time.monotonic() > until:
            raise TimeoutError(f"nodes did not join within {JOIN_S:g} s")
        time.sleep(0.1)


@contextmanager
def local_cluster(
    workers: int, shape: NodeShape, *, port: int | None = None, proxies: str = "HeadOnly"
) -> Iterator[LocalCluster]:
    """Run a cluster of one head and some workers, apart from any other Ray of this machine and user.

    It has a token of its own: Ray programs look for any cluster on their machine, and might take this one for theirs.
    """
    before = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="loraplex-", ignore_cleanup_errors=True) as home:
        os.environ.update(ISOLATION, HOME=home)
        set_auth_mode("token")
        set_env_auth_token(secrets.token_hex(32))
        reset_auth_token_state()
        cluster = LocalCluster(port=port or free_port(), proxies=proxies)
        try:
            cluster.start()
            cluster.grow(workers, shape)
            yield cluster
        finally:
            cluster.close()
            os.environ.clear()
            os.environ.update(before)
            reset_auth_token_state()


def demo_config(nodes: int, cache: Path) -> dict[str, Any]:
    """Return the arguments of an application that has one replica of a demo base on each node."""
    return {
        "bases": [
            {
                "id": "demo/sd15",
                "source": {"embedded": "demo/sd15"},
                "defaults": {"steps": 12, "guidance_scale": 3.0, "width": 64, "height": 64},
                "limits": {"min_side": 32, "max_side": 128, "max_pixels": 16384, "max_steps": 50},
                "replica": {"num_cpus": 0.2, "num_gpus": 1, "torch_threads": 1},
                "autoscaling": {"min_replicas": 1, "max_replicas": nodes, "target_ongoing_requests": 2},
            }
        ],
        "adapters": {"embedded": True, "hub": {"enabled": False}},
        "ingress": {"replicas": 2, "num_cpus": 0.1},
        "cache_dir": str(cache / "{node}"),
    }


def main() -> None:
    """Serve a demo base on a local cluster until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=4, help="worker nodes, each with one pretended GPU")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    from cluster.local_service import run_service

    shape = NodeShape(cpus=1, gpus=1)
    say = sys.stdout.write
    with local_cluster(options.nodes, shape, port=options.port) as cluster, tempfile.TemporaryDirectory() as cache:
        config = demo_config(options.nodes, Path(cache))
        run_service(config)
        ask = f"""curl {cluster.url} -d '{{"inputs": "a blue star"}}'"""
        say(f"ready at {cluster.url} on {options.nodes} worker nodes\n\n")
        say(f"  {ask} -o star.jpg\n")
        say(f"  seq 60 | xargs -P 12 -I% {ask} -so /dev/null        scale-out: one replica to {options.nodes}\n")
        for node_id in cluster.nodes:
            say(f"  kill -9 {raylet_of(node_id)}        node {node_id[:12]} is lost; run it during the line above\n")
        say("\nCtrl-C stops everything\n")
        sys.stdout.flush()
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            return


def raylet_of(node_id: str) -> int:
    """Return the process id of a node's raylet on this machine."""
    for process in psutil.process_iter(["name", "cmdline"]):
        if process.info["name"] == "raylet" and any(node_id in part for part in process.info["cmdline"] or ()):
            return int(process.pid)
    raise LookupError(f"no raylet of node {node_id} runs here")


def node_holds(node_id: str, deployment: str) -> bool:
    """Say whether a replica of a deployment runs on a node."""
    return any(deployment in command_line(worker) for worker in psutil.Process(raylet_of(node_id)).children())


if __name__ == "__main__":
    main()
