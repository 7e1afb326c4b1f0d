"""Whether a replica can go on: the decision behind its health check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serve_app.config import BaseModelConfig
    from serve_app.engine.worker.state import WorkerState

# After this many batches in a row that failed for reasons of ours, the device is taken to be broken.
MAX_FAILED_BATCHES = 3
# A GPU's steps are launched ahead of it, so that one silence can be a whole pass; with compiling, also a compilation.
STALL_AFTER_S = 300.0
STALL_AFTER_COMPILING_S = 1200.0


@dataclass(frozen=True, slots=True)
class HealthProblem:
    """A fault of a replica's worker, for which Serve should replace it.

    `message` is a sentence, `reason` the same in a word for metrics. `can_serve` says that it may still answer while
    it is being replaced; `is_fatal` that the process must end at once.
    """

    message: str
    reason: str
    can_serve: bool = False
    is_fatal: bool = False


def diagnose(state: WorkerState, base_id: str, *, stall_timeout_s: float = STALL_AFTER_S) -> HealthProblem | None:
    """Return what is wrong with a worker for good, or None; its device may make no progress for `stall_timeout_s`."""
    if state.is_corrupt:
        return HealthProblem(f"the loaded weights of {base_id} are damaged in memory", "weights")
    if state.is_lost:
        return HealthProblem(f"the device of {base_id} is beyond repair", "device", is_fatal=True)
    if not state.is_alive:
        return HealthProblem(f"the device thread of {base_id} died", "thread", is_fatal=True)
    if state.stalled_s > stall_timeout_s:
        message = f"the device of {base_id} has made no progress for {state.stalled_s:.0f} s"
        return HealthProblem(message, "stalled", is_fatal=True)
    if state.failed_batches >= MAX_FAILED_BATCHES:
        return HealthProblem(f"{state.failed_batches} batches in a row failed on {base_id}", "batches", can_serve=True)
    return None


def stall_timeout_s(base: BaseModelConfig) -> float:
    """Return how long a base's device may make no progress while it has work."""
    if base.replica.stall_timeout_s is not None:
        return base.replica.stall_timeout_s
    return STALL_AFTER_COMPILING_S if base.compile else STALL_AFTER_S
