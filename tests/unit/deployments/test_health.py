"""What Serve hears of a worker that cannot go on."""

from __future__ import annotations

from dataclasses import replace

import pytest

from serve_app.deployments.health import MAX_FAILED_BATCHES, ailment
from serve_app.engine.worker import WorkerState

WELL = WorkerState(waiting=3, running=1, applied=(), is_alive=True, failed_batches=MAX_FAILED_BATCHES - 1)


def test_a_busy_worker_is_well() -> None:
    assert ailment(WELL, "demo/sd15") is None


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (replace(WELL, is_corrupt=True, is_alive=False), "damaged in memory"),
        (replace(WELL, is_alive=False), "device thread of demo/sd15 died"),
        (replace(WELL, failed_batches=MAX_FAILED_BATCHES), "3 batches in a row"),
    ],
)
def test_what_cannot_go_on_is_named(state: WorkerState, reason: str) -> None:
    assert reason in (ailment(state, "demo/sd15") or "")
