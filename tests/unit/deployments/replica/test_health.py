"""What Serve hears of a worker that cannot go on, and which ailments end the process."""

from __future__ import annotations

from dataclasses import replace

import pytest

from serve_app.config import BaseModelConfig
from serve_app.deployments.replica.health import (
    MAX_FAILED_BATCHES,
    STALL_AFTER_COMPILING_S,
    STALL_AFTER_S,
    diagnose,
    stall_timeout_s,
)
from serve_app.engine.worker.state import WorkerState

WELL = WorkerState(
    waiting=3, running=1, applied=(), is_alive=True, failed_batches=MAX_FAILED_BATCHES - 1, stalled_s=STALL_AFTER_S
)


def test_a_busy_worker_is_well() -> None:
    assert diagnose(WELL, "demo/sd15") is None


@pytest.mark.parametrize(
    ("state", "reason", "is_fatal", "can_serve"),
    [
        (replace(WELL, is_corrupt=True, is_alive=False), "damaged in memory", False, False),
        (replace(WELL, is_lost=True, is_alive=False), "device of demo/sd15 is beyond repair", True, False),
        (replace(WELL, is_alive=False), "device thread of demo/sd15 died", True, False),
        (replace(WELL, stalled_s=STALL_AFTER_S + 1), "no progress for 301 s", True, False),
        (replace(WELL, failed_batches=MAX_FAILED_BATCHES), "3 batches in a row", False, True),
    ],
)
def test_what_cannot_go_on_is_named(state: WorkerState, reason: str, is_fatal: bool, can_serve: bool) -> None:
    found = diagnose(state, "demo/sd15")
    assert found is not None
    assert reason in found.message
    assert (found.is_fatal, found.can_serve) == (is_fatal, can_serve)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, STALL_AFTER_S),
        ({"compile": True}, STALL_AFTER_COMPILING_S),
        ({"compile": True, "replica": {"stall_timeout_s": 7.0}}, 7.0),
    ],
)
def test_how_long_a_device_may_be_still_is_configured_or_leaves_room_for_compiling(
    settings: dict[str, object], expected: float
) -> None:
    base = BaseModelConfig.model_validate({"id": "demo/sd15", "source": {"embedded": "demo/sd15"}, **settings})
    assert stall_timeout_s(base) == expected
