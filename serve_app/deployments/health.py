"""Whether a replica can go on: the decision behind its health check."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serve_app.engine.worker import WorkerState

# After this many batches in a row that failed for reasons of ours, the device is taken to be broken.
MAX_FAILED_BATCHES = 3


def ailment(state: WorkerState, base_id: str) -> str | None:
    """Say what is wrong for good with a replica's worker, so that Serve should replace it; None while nothing is."""
    if state.is_corrupt:
        return f"the loaded weights of {base_id} are damaged in memory"
    if not state.is_alive:
        return f"the device thread of {base_id} died"
    if state.failed_batches >= MAX_FAILED_BATCHES:
        return f"{state.failed_batches} batches in a row failed on {base_id}"
    return None
