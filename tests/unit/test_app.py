"""What Serve is told of the ingress and of a base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from serve_app.app import base, ingress
from serve_app.config import BaseArguments, IngressArguments
from serve_app.deployments.ingress.backpressure import most_held
from serve_app.live_settings import with_live_settings

BASE = {"id": "demo/sd15", "source": {"embedded": "demo/sd15"}}


def arguments(tmp_path: Path, **settings: Any) -> IngressArguments:
    return IngressArguments.model_validate({"ingress": settings, "shared": {"cache_dir": str(tmp_path)}})


def test_the_ingress_scales_and_is_placed_as_it_is_told(tmp_path: Path) -> None:
    scaling = {"min_replicas": 2, "max_replicas": 6, "target_ongoing_requests": 40}
    placed = {"num_cpus": 1.0, "resources": {"edge": 0.5}, "max_replicas_per_node": 1}
    asked = arguments(tmp_path, autoscaling=scaling, **placed)
    told: Any = ingress(asked)._bound_deployment
    numbers = told._deployment_config.autoscaling_config
    assert (numbers.min_replicas, numbers.max_replicas, numbers.target_ongoing_requests) == (2, 6, 40)
    assert told.ray_actor_options["resources"] == {"edge": 0.5}
    assert told._replica_config.max_replicas_per_node == 1
    # What may wait is counted for as many ingress replicas as there may be.
    config = with_live_settings(asked, {"bases": [BASE]})
    replica = config.bases[0].replica
    assert most_held(config) == 6 * replica.max_queued_requests + replica.max_ongoing_requests


def test_a_fixed_number_of_ingress_replicas_is_the_default(tmp_path: Path) -> None:
    told = ingress(arguments(tmp_path))._bound_deployment
    assert (told.num_replicas, told._deployment_config.autoscaling_config) == (2, None)


def test_a_base_is_placed_as_it_is_told(tmp_path: Path) -> None:
    placed = BASE | {"replica": {"resources": {"edge": 0.5}, "max_replicas_per_node": 2}}
    told: Any = base(BaseArguments.model_validate({"base": placed}))._bound_deployment
    assert (told.ray_actor_options["resources"], told._replica_config.max_replicas_per_node) == ({"edge": 0.5}, 2)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"replicas": 2, "autoscaling": {"max_replicas": 4}}, "either 'replicas' or 'autoscaling'"),
        ({"autoscaling": {"min_replicas": 5, "max_replicas": 4}}, "must be in this order"),
        ({"autoscaling": {}}, "max_replicas"),
    ],
)
def test_numbers_of_ingress_replicas_that_contradict_are_refused(
    tmp_path: Path, settings: dict[str, Any], why: str
) -> None:
    with pytest.raises(ValidationError, match=why):
        arguments(tmp_path, **settings)
