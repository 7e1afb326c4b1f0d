"""What a base is said to do, by what Serve says of its replicas and by how long its last start took."""

from __future__ import annotations

import pytest

from serve_app.catalog.replica_report import BaseState
from serve_app.config import BaseModelConfig
from serve_app.deployments.registry.base_states import counted_start_s, is_service_ready, room_of, state_of
from serve_app.deployments.registry.replica_counts import ReplicaCount

NOW_S = 1000.0


def starting(lasted_s: float, *, is_placed: bool) -> ReplicaCount:
    return ReplicaCount(starting=1, since_s=NOW_S - lasted_s, is_placed=is_placed)


@pytest.mark.parametrize(
    ("count", "start_s", "state"),
    [
        (None, 20.0, BaseState("starting")),
        (ReplicaCount(running=1, starting=1, since_s=5.0), 20.0, BaseState("running", expected_s=0.0)),
        (ReplicaCount(starting=1, failure="no"), 20.0, BaseState("failed", reason="no")),
        (ReplicaCount(), 20.0, BaseState("stopped", expected_s=20.0)),
        (ReplicaCount(), None, BaseState("stopped")),
        (starting(8.0, is_placed=True), 20.0, BaseState("starting", 992.0, 12.0)),
        (starting(8.0, is_placed=False), 20.0, BaseState("starting", 992.0, 12.0)),
        (starting(8.0, is_placed=True), None, BaseState("starting", 992.0)),
        (starting(70.0, is_placed=True), 20.0, BaseState("starting", 930.0, 2.0)),
        (
            starting(70.0, is_placed=False), 20.0,
            BaseState("waiting", 930.0, 20.0, "no node has room for a replica, which takes 1 GPU"),
        ),
    ],
)  # fmt: skip
def test_a_base_s_state_follows_from_its_replicas(
    count: ReplicaCount | None, start_s: float | None, state: BaseState
) -> None:
    assert state_of(count, start_s=start_s, now_s=NOW_S, room="1 GPU") == state


@pytest.mark.parametrize(
    ("asked_at", "start_s"), [(None, 30.0), (NOW_S - 33.0, 33.0), (NOW_S - 600.0, 40.0), (NOW_S - 29.0, 30.0)]
)
def test_a_start_counts_from_when_it_was_asked_for_without_a_long_wait_for_room(
    asked_at: float | None, start_s: float
) -> None:
    assert counted_start_s(30.0, asked_at, now_s=NOW_S) == start_s


def base(name: str, *, required: bool = False, min_replicas: int = 1) -> BaseModelConfig:
    return BaseModelConfig.model_validate(
        {
            "id": f"demo/{name}", "source": {"embedded": "demo/sd15"}, "required": required,
            "autoscaling": {"min_replicas": min_replicas}, "replica": {"num_gpus": 0.5, "num_cpus": 2},
        }
    )  # fmt: skip


def test_the_room_of_a_replica_is_told_in_words() -> None:
    assert room_of(base("a")) == "0.5 GPU, 2 CPU"


@pytest.mark.parametrize(
    ("bases", "running", "is_ready"),
    [
        ((base("a"), base("b")), (), False),
        ((base("a"), base("b")), ("demo/b",), True),
        ((base("a"), base("b", min_replicas=0)), (), True),
        ((base("a", required=True), base("b")), ("demo/b",), False),
        ((base("a", required=True), base("b", min_replicas=0)), ("demo/a",), True),
        ((base("a", required=True), base("b", required=True)), ("demo/a",), False),
    ],
)
def test_the_service_is_ready_once_what_is_required_runs(
    bases: tuple[BaseModelConfig, ...], running: tuple[str, ...], is_ready: bool
) -> None:
    states = {one.id: BaseState("running" if one.id in running else "starting") for one in bases}
    assert is_service_ready(bases, states) is is_ready


def test_a_base_that_may_go_to_zero_cannot_be_required() -> None:
    with pytest.raises(ValueError, match="'required' goes with min_replicas of 1 or more"):
        base("a", required=True, min_replicas=0)
