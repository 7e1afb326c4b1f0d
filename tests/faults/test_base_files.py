"""A base of the Hub on nodes that join one after another: only the first asks the Hub for weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from cluster.local_cluster import NodeShape, local_cluster
from serve_app.deployments.registry.keeper_client import keeper_of
from tests.faults.breaking import replica_pids, until
from tests.hub_server import CDN, HubServer
from tests.service import Service
from tests.tiny import tiny_folder

BASE, NODES = "tiny/base", 3

pytestmark = pytest.mark.timeout(1200)


def config(cache: Path) -> dict[str, Any]:
    return {
        "bases": [
            {
                "id": BASE,
                "source": {"hub": BASE},
                "schedulers": ["DDIMScheduler"],
                "defaults": {"steps": 2, "width": 32, "height": 32},
                "limits": {"min_side": 32, "max_side": 64, "max_pixels": 4096},
                "replica": {"num_cpus": 0.2, "num_gpus": 1, "torch_threads": 1},
                # As many as there will be nodes: all but the first wait for one.
                "autoscaling": {"policy": "ray", "min_replicas": NODES, "max_replicas": NODES},
            }
        ],
        "adapters": {"hub": {"enabled": False}},
        "base_files": {"from_peers": True},
        "ingress": {"replicas": 1, "num_cpus": 0.1},
        "cache_dir": str(cache / "{node}"),
    }


def shape(home: Path) -> NodeShape:
    return NodeShape(cpus=1, gpus=1, environment={"HF_HOME": str(home)})


def nodes_that_offer() -> set[str]:
    keeper: Any = keeper_of("loraplex")
    return {offer.node for offer in keeper.base_offers.remote([BASE]).result(timeout_s=60)}


def weights(home: Path) -> set[str]:
    return {path.name for path in home.glob("hub/models--*/blobs/*") if len(path.name) == 64}


def test_a_node_that_joins_has_its_weights_from_a_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cluster.local_service import run_service

    homes = [tmp_path / name for name in ("first", "second", "third")]
    with HubServer() as hub:
        hub.push_folder(BASE, tiny_folder("sd15"))
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        with local_cluster(1, shape(homes[0])) as nodes:
            run_service(config(tmp_path), waits=False)
            until(lambda: len(nodes_that_offer()) == 1, "the offer of the first node")
            fetched = hub.count(BASE, CDN)
            assert len(weights(homes[0])) == fetched > 0
            nodes.grow(1, shape(homes[1]))
            until(lambda: len(nodes_that_offer()) == 2, "the offer of the second node")
            assert hub.count(BASE, CDN) == fetched
            # Now without the Hub: the commit and the small files are the peers' too.
            hub.down()
            nodes.grow(1, shape(homes[2]))
            until(lambda: nodes_that_offer() == set(nodes.nodes), "the offer of the third node")
            assert [weights(home) for home in homes] == [weights(homes[0])] * NODES
            until(lambda: Service(nodes.url).http.get("/health").status_code == 200, "the service")
            assert Service(nodes.url).ask("a star").status_code == 200
            assert len(replica_pids("base-tiny--base")) == NODES
            for source in ("hub", "peer"):
                counted = rf'loraplex_base_fetched_bytes_total{{.*source="{source}"'
                until(lambda counted=counted: re.search(counted, nodes.metrics()) is not None, "the count")
