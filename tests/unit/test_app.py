"""What Serve is told of the ingress and of a base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from serve_app.app import build
from serve_app.config import AppConfig
from serve_app.deployments.ingress.backpressure import most_held

BASE = {"id": "demo/sd15", "source": {"embedded": "demo/sd15"}}


def config(tmp_path: Path, base: dict[str, Any] | None = None, **ingress: Any) -> AppConfig:
    return AppConfig.model_validate({"bases": [BASE | (base or {})], "ingress": ingress, "cache_dir": str(tmp_path)})


def test_the_ingress_scales_and_is_placed_as_it_is_told(tmp_path: Path) -> None:
    scaling = {"min_replicas": 2, "max_replicas": 6, "target_ongoing_requests": 40}
    placed = {"num_cpus": 1.0, "resources": {"edge": 0.5}, "max_replicas_per_node": 1}
    asked = config(tmp_path, autoscaling=scaling, **placed)
    told: Any = build(asked)._bound_deployment
    numbers = told._deployment_config.autoscaling_config
    assert (numbers.min_replicas, numbers.max_replicas, numbers.target_ongoing_requests) == (2, 6, 40)
    assert told.ray_actor_options["resources"] == {"edge": 0.5}
    assert told._replica_config.max_replicas_per_node == 1
    # What may wait is counted for as many ingress replicas as there may be.
    replica = asked.bases[0].replica
    assert most_held(asked) == 6 * replica.max_queued_requests + replica.max_ongoing_requests


def test_a_fixed_number_of_ingress_replicas_is_the_default(tmp_path: Path) -> None:
    told = build(config(tmp_path))._bound_deployment
    assert (told.num_replicas, told._deployment_config.autoscaling_config) == (2, None)


def test_a_base_is_placed_as_it_is_told(tmp_path: Path) -> None:
    base = {"replica": {"resources": {"edge": 0.5}, "max_replicas_per_node": 2}}
    ingress: Any = build(config(tmp_path, base))._bound_deployment
    handles = ingress.init_args[2]
    told = handles["demo/sd15"]._bound_deployment
    assert (told.ray_actor_options["resources"], told._replica_config.max_replicas_per_node) == ({"edge": 0.5}, 2)


@pytest.mark.parametrize(
    ("ingress", "why"),
    [
        ({"replicas": 2, "autoscaling": {"max_replicas": 4}}, "either 'replicas' or 'autoscaling'"),
        ({"autoscaling": {"min_replicas": 5, "max_replicas": 4}}, "must be in this order"),
        ({"autoscaling": {}}, "max_replicas"),
    ],
)
def test_numbers_of_ingress_replicas_that_contradict_are_refused(
    tmp_path: Path, ingress: dict[str, Any], why: str
) -> None:
    with pytest.raises(ValidationError, match=why):
        config(tmp_path, **ingress)
