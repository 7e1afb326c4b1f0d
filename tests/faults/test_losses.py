"""One part of the service after another is lost or hangs while requests are in it, and every image is its reference.

The tests share a cluster and run in the order of the file: the last ones take a node away and shrink the service.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from cluster.local_cluster import LocalCluster, NodeShape, local_cluster
from cluster.local_service import run_service
from cluster.ports import free_port
from serve_app.environment import launch_environment
from tests.chaos.blows import running_pids
from tests.faults.breaking import has_ended, held, kill, replica_pids, talking_to, until
from tests.hub_server import HubServer
from tests.service import EMBEDDED, Service, pixels_of

APP, BASE, INGRESS = "loraplex", "base-demo--sd15", "LoraplexIngress"
PROMPT, ADAPTER = "a blue square on a red background", "demo/sd15-night"
SLOW = {"num_inference_steps": 50, "width": 128, "height": 128}
SEEDS = range(6)
# Work that lasts longer than a busy machine may let this process wait before it kills.
LONG = 240
ROUNDS = 10
REPLICAS = 2
CHECK_PERIOD_S, CHECK_TIMEOUT_S = 1.0, 3.0
# Three checks in a row without an answer, and then a new replica's start on a busy machine.
NOTICED_S = 3 * (CHECK_TIMEOUT_S + CHECK_PERIOD_S) + 60
# A service made again part by part.
REDEPLOYED_S = 400.0

pytestmark = pytest.mark.timeout(1200)

Picture = NDArray[np.uint8]


def config(hub: HubServer, cache: Path, *, replicas: int = REPLICAS) -> dict[str, Any]:
    checks = {"health_check_period_s": CHECK_PERIOD_S, "health_check_timeout_s": CHECK_TIMEOUT_S}
    return {
        "bases": [
            {
                "id": "demo/sd15",
                "source": {"embedded": "demo/sd15"},
                "defaults": {"steps": 4, "guidance_scale": 3.0, "width": 64, "height": 64},
                "limits": {"min_side": 32, "max_side": 128, "max_pixels": 16384, "max_steps": LONG},
                # One image in a pass: then each is its reference to the bit.
                "replica": {"num_cpus": 0.2, "torch_threads": 1, "max_batch_images": 1, **checks},
                "autoscaling": {"policy": "ray", "min_replicas": replicas, "max_replicas": replicas},
            }
        ],
        "adapters": {"embedded": True, "hub": {"endpoint": hub.endpoint, "timeout_s": 60.0}},
        "ingress": {"replicas": replicas, "num_cpus": 0.1, **checks},
        "cache_dir": str(cache / "{node}"),
    }


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        server.push_folder("acme/held", EMBEDDED / ADAPTER)
        yield server


@pytest.fixture(scope="module")
def arguments(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return config(hub, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def workers_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def nodes(arguments: dict[str, Any], workers_port: int) -> Iterator[LocalCluster]:
    """Two nodes, each with room for everything; the head's proxy has a port to itself."""
    with pytest.MonkeyPatch.context() as environment:
        for name, value in launch_environment().items():
            environment.setenv(name, value)
        environment.setenv("RAY_SERVE_WORKER_PROXY_HTTP_PORT", str(workers_port))
        with local_cluster(2, NodeShape(cpus=2), proxies="EveryNode") as cluster:
            deploy(arguments)
            yield cluster


def deploy(arguments: dict[str, Any]) -> None:
    run_service(arguments)


@pytest.fixture(scope="module")
def references(nodes: LocalCluster) -> list[Picture]:
    service = Service(nodes.url)
    return [service.draw(PROMPT, lora=ADAPTER, seed=seed, **SLOW) for seed in SEEDS]


@pytest.fixture
def service(nodes: LocalCluster, references: list[Picture]) -> Service:
    """The service with all its replicas, and nothing that is going or coming."""
    until(is_whole, "a whole service")
    return Service(nodes.url)


def is_whole() -> bool:
    """Say whether all replicas run; Serve alone takes those that were just killed for running."""
    bases, ingresses = replica_pids(BASE), replica_pids(INGRESS)
    return len(bases) == len(ingresses) == REPLICAS and bases.keys() | ingresses.keys() <= running_pids()


@contextmanager
def in_flight(service: Service) -> Iterator[list[Future[httpx.Response]]]:
    """Slow requests, one for each reference, of which some run on each replica and some wait."""

    def ask(seed: int) -> httpx.Response:
        return service.ask(PROMPT, lora=ADAPTER, seed=seed, **SLOW)

    asked: list[Future[httpx.Response]] = []

    def are_busy() -> bool:
        # An ingress that has just started may not have heard of all of them yet.
        rows = replicas(service)
        is_everywhere = len(rows) == REPLICAS and all(row["running"] for row in rows)
        return is_everywhere and any(row["waiting"] for row in rows)

    def are_answered() -> bool:
        return all(one.done() for one in asked)

    with ThreadPoolExecutor(len(SEEDS)) as pool:
        # How they share depends on the pace that each has measured, which the machine decides: so perhaps once more.
        for _ in range(ROUNDS):
            asked = [pool.submit(ask, seed) for seed in SEEDS]
            until(lambda: are_busy() or are_answered(), "requests everywhere")
            if not are_answered():
                break
        else:
            pytest.fail("requests were never everywhere")
        yield asked


def replicas(service: Service) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = service.http.get("/v1/replicas").raise_for_status().json()["data"]
    return rows


def assert_answered(asked: list[Future[httpx.Response]], references: list[Picture]) -> None:
    replies = [one.result() for one in asked]
    assert [reply.status_code for reply in replies] == [200] * len(replies), [reply.text[:200] for reply in replies]
    for reply, reference in zip(replies, references, strict=True):
        assert np.array_equal(pixels_of(reply), reference)


@contextmanager
def streamed(service: Service, **body: Any) -> Iterator[httpx.Response]:
    """The reply that is a stream of events."""
    asked = {"prompt": PROMPT, "stream": True, **body}
    with service.http.stream("POST", "/v1/images/generations", json=asked) as reply:
        assert reply.status_code == 200, reply.read()
        yield reply


def generated(service: Service, **body: Any) -> str:
    """One image in OpenAI's shape, as it is written."""
    reply = service.http.post("/v1/images/generations", json={"prompt": PROMPT, **body})
    image: str = reply.raise_for_status().json()["data"][0]["b64_json"]
    return image


def test_requests_that_run_or_wait_on_a_killed_replica_get_their_images_elsewhere(
    service: Service, references: list[Picture]
) -> None:
    with in_flight(service) as asked:
        kill(next(iter(replica_pids(BASE))))
    assert_answered(asked, references)


def test_a_request_and_a_stream_whose_adapter_is_fetched_by_a_killed_replica_get_their_images(
    service: Service, hub: HubServer, references: list[Picture]
) -> None:
    hub.hold("acme/held", is_downloads_only=True)

    def ask_for_stream() -> list[str]:
        with streamed(service, lora="acme/held", seed=1, num_inference_steps=4) as reply:
            return list(reply.iter_lines())

    cdn = int(hub.cdn.rpartition(":")[2])
    with ThreadPoolExecutor(2) as pool:
        asked = pool.submit(service.ask, PROMPT, lora="acme/held", seed=0, **SLOW)
        stream = pool.submit(ask_for_stream)
        try:
            until(lambda: bool(talking_to(cdn, replica_pids(BASE))), "a fetch")
            for pid in talking_to(cdn, replica_pids(BASE)):
                kill(pid)
        finally:
            hub.release("acme/held")
        assert_answered([asked], references[:1])
        assert "event: image_generation.completed" in stream.result()


def test_requests_through_a_killed_ingress_get_their_images_through_another(
    service: Service, references: list[Picture]
) -> None:
    with in_flight(service) as asked:
        kill(next(iter(replica_pids(INGRESS))))
    assert_answered(asked, references)


def test_without_any_ingress_requests_and_streams_without_a_picture_wait_for_the_next(
    service: Service, references: list[Picture]
) -> None:
    victims = replica_pids(INGRESS)
    # It names no seed: the image has the one that the dead ingress drew and told.
    with in_flight(service) as asked, streamed(service, num_inference_steps=LONG) as reply:
        lines = reply.iter_lines()
        assert any('"step":1,' in line for line in lines)
        for victim in victims:
            kill(victim)
        *progress, name, data, _ = lines
    assert any('"step":1,' in line for line in progress), "it tells how far it is from the start"
    assert name == "event: image_generation.completed"
    drawn = generated(service, num_inference_steps=LONG, seed=int(reply.headers["x-seed"]))
    assert json.loads(data.removeprefix("data: "))["b64_json"] == drawn
    assert_answered(asked, references)


def test_a_stream_that_had_shown_a_picture_when_its_ingress_was_killed_says_to_try_again(service: Service) -> None:
    victims = replica_pids(INGRESS)
    with streamed(service, num_inference_steps=LONG, size="128x128", partial_images=3) as reply:
        lines = reply.iter_lines()
        assert "event: image_generation.partial_image" in lines
        for victim in victims:
            kill(victim)
        *_, name, data, _ = lines
    fault = json.loads(data.removeprefix("data: "))["error"]
    assert name == "event: error"
    assert fault["code"] == "ingress_lost"
    assert "try again" in fault["message"]


@pytest.mark.parametrize("deployment", [BASE, INGRESS])
def test_a_replica_that_hangs_is_replaced_and_its_requests_are_answered_by_another(
    service: Service, references: list[Picture], deployment: str
) -> None:
    victim = next(iter(replica_pids(deployment)))
    with in_flight(service) as asked, held(victim):
        until(lambda: has_ended(victim), "the end of what hangs", timeout_s=NOTICED_S)
        assert_answered(asked, references)


@contextmanager
def under_load(service: Service, references: list[Picture]) -> Iterator[list[Future[int]]]:
    """Callers that ask for one reference after another; each future is how many answers a caller had."""
    is_over = False

    def ask_on(seed: int) -> int:
        count = 0
        while not is_over:
            picture = service.draw(PROMPT, lora=ADAPTER, seed=seed, **SLOW)
            assert np.array_equal(picture, references[seed])
            count += 1
        return count

    with ThreadPoolExecutor(3) as pool:
        asking = [pool.submit(ask_on, seed) for seed in range(3)]
        try:
            yield asking
        finally:
            is_over = True


def test_a_lost_node_with_an_ingress_and_a_proxy_loses_nothing_and_its_callers_go_to_another(
    nodes: LocalCluster, service: Service, workers_port: int, references: list[Picture]
) -> None:
    victim = next(iter(replica_pids(INGRESS).values()))
    elsewhere = Service(f"http://127.0.0.1:{workers_port}")
    with in_flight(service) as asked, ThreadPoolExecutor(2) as pool:
        beside = [pool.submit(elsewhere.ask, PROMPT, lora=ADAPTER, seed=seed, **SLOW) for seed in range(2)]
        nodes.kill(victim)
        assert_answered(asked, references)
        for seed, one in enumerate(beside):
            if isinstance(one.exception(), httpx.TransportError):
                # Its proxy was on the node; the port now belongs to the other node's.
                assert np.array_equal(elsewhere.draw(PROMPT, lora=ADAPTER, seed=seed, **SLOW), references[seed])
            else:
                assert one.result().status_code == 200


def test_a_service_that_shrinks_under_load_loses_nothing(
    nodes: LocalCluster, service: Service, references: list[Picture], hub: HubServer, arguments: dict[str, Any]
) -> None:
    cache = Path(arguments["cache_dir"]).parent
    with under_load(service, references) as asking:
        deploy(config(hub, cache, replicas=1))
        is_smaller = lambda: len(replica_pids(BASE)) == len(replica_pids(INGRESS)) == 1  # noqa: E731
        until(is_smaller, "a smaller service", timeout_s=REDEPLOYED_S)
    assert all(one.result() for one in asking)
