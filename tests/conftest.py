"""One cluster and one service for all integration tests: starting Ray costs more than all of them."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

from tests.collector import Collector
from tests.hub_server import HubServer
from tests.service import BASES, EMBEDDED, Service, base_settings, ray_cluster
from tests.small_disk import small_disk

if TYPE_CHECKING:
    from tests.s3_server import S3Server

# Speed lives in benchmarks: a machine that is busy for a moment fails no property. A run draws the examples of the run
# before it, so that a change is what fails it; EXPLORE=1 draws others.
hypothesis.settings.register_profile("steady", deadline=None, derandomize="EXPLORE" not in os.environ)
hypothesis.settings.load_profile("steady")

# Torch's threads spin, the tests share the cores, and the bits of a sum depend on how many threads share it. Children
# inherit this.
os.environ["OMP_NUM_THREADS"] = "1"

# What is imported and collected lasts until the end: no garbage collection needs to look at it.
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


# What runs against a cluster runs in one process, one after the other; everything else runs beside it, by module.
# The tests of faults have a cluster of several nodes to themselves, and so need a run of their own.
CLUSTER_FOLDERS = {"integration", "clients", "browser"}


def _needs_cluster(nodeid: str) -> bool:
    return nodeid.split("/")[1] in CLUSTER_FOLDERS


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Leave nothing to those that follow that costs them time.

    An idle cluster takes a third of a core: it ends with the last test that needs it. What a module has left behind
    lasts until the end, too.
    """
    yield
    if nextitem and nextitem.path != item.path:
        gc.collect()
        gc.freeze()
    if _needs_cluster(item.nodeid) and not (nextitem and _needs_cluster(nextitem.nodeid)):
        for fixture in item.session._fixturemanager.getfixturedefs("cluster", item) or ():
            fixture.finish(item._request)  # type: ignore[attr-defined]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Return what hands the tests to processes: those that need the cluster to one of them, others by module."""
    from xdist.scheduler import LoadScopeScheduling

    class ClusterApart(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "cluster" if _needs_cluster(nodeid) else nodeid.split("::", 1)[0]

    return ClusterApart(config, log)


@pytest.fixture(scope="session")
def hub() -> Iterator[HubServer]:
    """A Hub of our own on loopback, with demo adapters under other ids."""
    with HubServer() as server:
        for name in ("sdxl-sepia", "sd15-night"):
            server.push_folder(f"acme/{name}", EMBEDDED / "demo" / name)
        server.push_folder("acme/slow-inverted", EMBEDDED / "demo" / "sdxl-inverted")
        yield server


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MiB."""
    with small_disk(tmp_path / "disk") as folder:
        yield folder


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    from tests.s3_server import S3Server  # moto, which takes a second

    with S3Server() as server:
        yield server


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """An S3 of our own on loopback, of which the environment knows as S3's clients look for it."""
    s3_server.set_up(monkeypatch)
    s3_server.fault = None
    s3_server.requests.clear()
    return s3_server


@pytest.fixture(scope="session")
def broken_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.broken_adapters import write_broken_adapters  # torch, which most runs of a part do without

    root = tmp_path_factory.mktemp("folders")
    write_broken_adapters(root, EMBEDDED)
    return root


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with ray_cluster(tmp_path_factory.mktemp("home")) as port:
        yield port


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    """A collector of traces; the service sends it those of callers who ask for one, and no others."""
    with Collector() as collector:
        yield collector


@pytest.fixture(scope="session")
def families(cluster: int, tmp_path_factory: pytest.TempPathFactory) -> Service:
    from tests.family_service import start_families

    return start_families(tmp_path_factory.mktemp("families"), cluster)


@pytest.fixture(scope="session")
def service_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The service's cache folder, in which a file holds its devices: `tests.replicas.controlled`."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def service(cluster: int, hub: HubServer, broken_root: Path, collector: Collector, service_cache: Path) -> Service:
    """A service of both demo bases, whose devices stand still while a test says so."""
    from cluster.local_service import run_service
    from tests.replicas.controlled import NO_LIMIT_S, ControlledReplica

    replica = base_settings(BASES[0])["replica"] | {"max_backlog_s": NO_LIMIT_S}
    config: dict[str, Any] = {
        "bases": [base_settings(base_id, replica=replica) for base_id in BASES],
        "adapters": {
            "embedded": True,
            "folders": [str(broken_root)],
            "hub": {"endpoint": hub.endpoint, "timeout_s": 60.0},
        },
        "ingress": {"replicas": 2, "num_cpus": 0.1},
        "tracing": {"endpoint": collector.endpoint, "sample": 0.0},
        "request_timeout_s": NO_LIMIT_S,
        "cache_dir": str(service_cache),
    }
    run_service(config, replica=ControlledReplica)
    return Service(f"http://127.0.0.1:{cluster}")
