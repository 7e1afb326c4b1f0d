"""A service on several nodes: upgraded, joined and bereft of a node under load, its adapters fetched once.

The tests build on one another and run in the order of the file: starting a cluster costs more than all of them.
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from cluster.checks.monitoring import RULES, SERVE_METRICS, names_in
from cluster.grafana.dashboard import ROWS
from cluster.local_cluster import LocalCluster, NodeShape, alive_nodes, local_cluster, node_holds
from serve_app.observability.metrics import LOST, SHORTAGES
from tests.faults.breaking import kill, replica_pids, until
from tests.hub_server import CDN, HubServer
from tests.service import Service

# Nothing in this file makes them happen, and Ray exports a counter from its first count on.
UNCAUSED = {f"ray_{declaration.name}_total" for declaration in (LOST, SHORTAGES)}

ROOT = Path(__file__).parents[2]
NIGHT = ROOT / "serve_app" / "demo" / "hub" / "demo" / "sd15-night"
SHAPE = NodeShape(cpus=1, gpus=1)
FIRST_NODES, NODES = 2, 4

pytestmark = pytest.mark.timeout(1200)


def config(hub: HubServer, cache: Path, *, max_steps: int) -> dict[str, Any]:
    """One replica of a base on each node, for up to all nodes; whatever joins is used."""
    return {
        "bases": [
            {
                "id": "demo/sd15",
                "source": {"embedded": "demo/sd15"},
                "defaults": {"steps": 4, "guidance_scale": 3.0, "width": 32, "height": 32},
                "limits": {"min_side": 32, "max_side": 64, "max_pixels": 4096, "max_steps": max_steps},
                # A host cache that holds one adapter at a time, so that there is something to evict.
                "replica": {
                    "num_cpus": 0.2,
                    "num_gpus": 1,
                    "torch_threads": 1,
                    "max_ongoing_requests": 2,
                    "max_queued_requests": 300,
                    "host_cache": "100KB",
                    "health_check_period_s": 2,
                },
                "autoscaling": {
                    "policy": "ray",
                    "min_replicas": FIRST_NODES,
                    "max_replicas": NODES,
                    "target_ongoing_requests": 2,
                    "downscale_delay_s": 600,
                },
            }
        ],
        "adapters": {"hub": {"endpoint": hub.endpoint, "timeout_s": 60.0}, "sharing": {"enabled": True}},
        "ingress": {"replicas": 2, "num_cpus": 0.1},
        "cache_dir": str(cache / "{node}"),
    }


def deploy(arguments: dict[str, Any]) -> None:

    from cluster.local_service import run_service

    run_service(arguments)


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        for name in ("night", "everywhere"):
            server.push_folder(f"acme/{name}", NIGHT)
        yield server


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def nodes(hub: HubServer, cache: Path) -> Iterator[LocalCluster]:
    with local_cluster(FIRST_NODES, SHAPE) as running:
        deploy(config(hub, cache, max_steps=50))
        yield running


@dataclass
class Load:
    """Callers that ask one after another for as long as it lasts."""

    service: Service
    statuses: Counter[int | str] = field(default_factory=Counter)
    is_over: threading.Event = field(default_factory=threading.Event)

    def ask_on(self, seed: int) -> None:
        while not self.is_over.is_set():
            try:
                self.statuses[self.service.ask("a star", lora="acme/night", seed=seed).status_code] += 1
            except httpx.TransportError as error:
                self.statuses[type(error).__name__] += 1
            seed += 100


@contextmanager
def under_load(url: str, callers: int) -> Iterator[Load]:
    load = Load(Service(url))
    with ThreadPoolExecutor(callers) as pool:
        asking = [pool.submit(load.ask_on, seed) for seed in range(callers)]
        try:
            until(lambda: sum(load.statuses.values()) >= callers, "an answer for each")
            yield load
        finally:
            load.is_over.set()
        for one in asking:
            one.result()


def running_replicas() -> int:
    from ray import serve

    from cluster.local_service import application_of

    deployment = serve.status().applications[application_of("demo/sd15")].deployments["base-demo--sd15"]
    return int(deployment.replica_states.get("RUNNING", 0))


def canonical_files(cache: Path) -> list[Path]:
    return list(cache.glob("*/admitted/*/*.canonical"))


def test_an_upgrade_under_load_loses_nothing(nodes: LocalCluster, hub: HubServer, cache: Path) -> None:
    # One caller: with more wanted than the nodes can hold, Serve starts new replicas that have no room and stops no old
    # one for them; docs/operations.md warns of it.
    with under_load(nodes.url, callers=1) as load:
        before = load.service.ask("a star", num_inference_steps=50)
        deploy(config(hub, cache, max_steps=40))
        asked = sum(load.statuses.values())
        until(lambda: sum(load.statuses.values()) > asked + 4, "further answers")
    assert before.status_code == 200, before.text
    # The proxy hears of new ingresses a moment later, and one that is going answers as before.
    until(lambda: load.service.ask("a star", num_inference_steps=50).status_code == 400, "the new limit")
    assert set(load.statuses) == {200}, load.statuses


def test_nodes_that_join_under_load_are_used(nodes: LocalCluster) -> None:
    with under_load(nodes.url, callers=8) as load:
        nodes.grow(NODES - FIRST_NODES, SHAPE)
        until(lambda: running_replicas() == NODES, "a replica on each node")
    assert set(load.statuses) == {200}, load.statuses


def test_an_adapter_asked_for_on_every_node_is_fetched_once(nodes: LocalCluster, hub: HubServer, cache: Path) -> None:
    known = len(canonical_files(cache))
    service = Service(nodes.url)

    def asked_everywhere() -> bool:
        with ThreadPoolExecutor(12) as pool:
            replies = list(pool.map(lambda seed: service.ask("a star", lora="acme/everywhere", seed=seed), range(12)))
        assert {reply.status_code for reply in replies} == {200}, [reply.text for reply in replies][:1]
        return len(canonical_files(cache)) == known + NODES

    until(asked_everywhere, "a canonical file on each node")
    whole = [one for one in hub.requests if one.repo_id == "acme/everywhere" and one.kind == CDN and one.range is None]
    assert len(whole) == 1
    until(
        lambda: counted(nodes.metrics(), "ray_loraplex_file_fetches_total", 'source="peer"') >= NODES - 1, "the count"
    )


def test_a_lost_node_costs_no_request(nodes: LocalCluster) -> None:
    victim = next(node for node in nodes.nodes if not node_holds(node, "LoraplexIngress"))
    with under_load(nodes.url, callers=8) as load:
        nodes.kill(victim)
        asked = sum(load.statuses.values())
        until(lambda: sum(load.statuses.values()) > asked + 30, "further answers")
    assert set(load.statuses) == {200}, load.statuses


def test_a_drained_node_costs_no_request_and_ends_once_it_is_idle(nodes: LocalCluster) -> None:
    leaving = next(node for node in nodes.nodes if node_holds(node, "LoraplexIngress"))
    with under_load(nodes.url, callers=8) as load:
        nodes.drain(leaving, within_s=330)
        until(lambda: leaving not in alive_nodes(), "the node's end")
        asked = sum(load.statuses.values())
        until(lambda: sum(load.statuses.values()) > asked + 10, "further answers")
    assert set(load.statuses) == {200}, load.statuses


def test_every_metric_of_the_rules_and_the_dashboard_is_exported(nodes: LocalCluster) -> None:
    service = Service(nodes.url)
    assert service.ask("a star", lora="acme/none").status_code == 404
    rules = [
        rule["expr"]
        for name in RULES
        for group in yaml.safe_load((ROOT / "cluster" / "prometheus" / name).read_text())["groups"]
        for rule in group["rules"]
    ]
    queries = [query for _, row in ROWS for panel in row for _, query in panel.queries]
    named = {name for expression in rules + queries for name in names_in(expression)}

    def missing() -> set[str]:
        return named - UNCAUSED - set(re.findall(r"^(ray_\w+)(?:\{| )", nodes.metrics(), re.MULTILINE))

    def is_nothing_missing() -> bool:
        names = missing()
        if "ray_loraplex_cancelled_total" in names:
            leave(service)
        if "ray_loraplex_retries_total" in names:
            lose_a_replica(service)
        return not names

    assert named > SERVE_METRICS | UNCAUSED
    try:
        until(is_nothing_missing, "the last metric", poll_s=3.0)
    except AssertionError:
        pytest.fail(f"nothing exports {sorted(missing())}")


def leave(service: Service) -> None:
    """Ask for a picture and hang up at its first step; it may be done before that is heard of."""
    asked = {"prompt": "a star", "stream": True, "num_inference_steps": 40}
    with service.http.stream("POST", "/v1/images/generations", json=asked) as reply:
        next((line for line in reply.iter_lines() if '"step":1,' in line), None)


def lose_a_replica(service: Service) -> None:
    """Kill a replica while as many requests are on their way as keep all busy; it may have none all the same."""
    with ThreadPoolExecutor(2 * NODES) as pool:
        asked = [pool.submit(service.ask, "a star", seed=seed, num_inference_steps=40) for seed in range(2 * NODES)]
        wait(asked, return_when=FIRST_COMPLETED)
        victim, *others = replica_pids("base-demo--sd15")
        kill(victim)
    assert {one.result().status_code for one in asked} == {200}, [one.result().text[:200] for one in asked]
    until(lambda: len(replica_pids("base-demo--sd15").keys() - {victim}) > len(others), "another in its place")


def counted(metrics: str, name: str, label: str) -> float:
    lines = [line for line in metrics.splitlines() if line.startswith(name) and label in line]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)
