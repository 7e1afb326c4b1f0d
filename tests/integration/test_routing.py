"""The router within Serve: two replicas of one base behind two ingress replicas."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from serve_app.routing.stats import decode
from tests.service import Service, base_settings

APPLICATION = "routing"
BASE = "demo/sd15"
STYLES = ("night", "sepia", "sketch", "stripes")


@pytest.fixture(scope="module")
def two_replicas(cluster: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    from ray import serve

    from serve_app.app import build
    from serve_app.config import AppConfig

    config = AppConfig.model_validate(
        {
            "bases": [base_settings(BASE, autoscaling={"min_replicas": 2, "max_replicas": 2})],
            "adapters": {"embedded": True, "hub": {"enabled": False}},
            "ingress": {"replicas": 2, "num_cpus": 0.1},
            "cache_dir": str(tmp_path_factory.mktemp("cache")),
        }
    )
    serve.run(build(config), name=APPLICATION, route_prefix=f"/{APPLICATION}")
    yield Service(f"http://127.0.0.1:{cluster}/{APPLICATION}")
    serve.delete(APPLICATION)


def residents() -> list[frozenset[str]]:
    """The adapters in host memory, replica by replica, as they tell the routers."""
    from ray import serve

    handle = serve.get_deployment_handle("base-demo--sd15", APPLICATION)
    stats = [decode(told) for told in handle.broadcast("record_routing_stats").results()]
    assert len(stats) == 2
    return [told.host for told in stats if told is not None]


def test_adapters_stay_on_their_replica_while_it_is_free_and_spill_over_when_it_is_not(two_replicas: Service) -> None:
    for seed in range(5):
        for style in STYLES:
            two_replicas.draw("a red circle", model=f"demo/sd15-{style}", seed=seed, num_inference_steps=2)
    held = residents()
    # Two are allowed for: a router may choose before it has heard where an adapter went. By chance it would be eight.
    assert len(frozenset.union(*held)) == len(STYLES)
    assert sum(map(len, held)) <= len(STYLES) + 2

    # Serve's own multiplexed router would wait for the one replica that holds it: it takes 16 requests at once.
    with ThreadPoolExecutor(10) as callers:
        burst = [
            callers.submit(
                two_replicas.draw, "a red circle", model="demo/sd15-night", seed=seed, num_inference_steps=40
            )
            for seed in range(10)
        ]
        for call in burst:
            call.result()
    assert len(frozenset.intersection(*residents())) >= 1
