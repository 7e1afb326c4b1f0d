"""The state of a worker."""

from __future__ import annotations

from dataclasses import dataclass

from serve_app.engine.worker.memory import OomCounts
from serve_app.engine.worker.pace import LoadStats, guess_of
from serve_app.engine.worker.scheduling import AdapterSetKey
from serve_app.work import LatencyModel

NO_WORK = LoadStats(0.0, guess_of("cpu"), 0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class WorkerState:
    """The state of a worker: requests waiting and running, the adapters in the weights, and whether it can go on.

    `steps` counts the denoising steps run since the start, for all requests.

    `failed_batches` counts the batches since the last good one that failed for reasons of ours: a device that
    is broken for good shows as a number that grows. `is_corrupt` says that the loaded weights have changed, after
    which the worker takes nothing more; `self_checks` counts the times that all of them were found sound. `is_lost`
    says the same of the device itself, and `stalled_s` for how long it has done no step though there is work.
    `prepared` counts the swaps that had been prepared while the batch before them ran, `changes` all of them, which
    took `changing_s` together. `suspended` counts the requests of `running` that were set aside for others. `work` is
    what there is to do in seconds.
    """

    waiting: int
    running: int
    applied: AdapterSetKey
    is_alive: bool
    failed_batches: int
    steps: int = 0
    is_corrupt: bool = False
    self_checks: int = 0
    prepared: int = 0
    work: LoadStats = NO_WORK
    is_lost: bool = False
    stalled_s: float = 0.0
    shortages: OomCounts = OomCounts()
    suspended: int = 0
    changes: int = 0
    changing_s: float = 0.0

    @property
    def backlog_s(self) -> float:
        """Seconds of work that run, wait or are on their way here."""
        return self.work.backlog_s

    @property
    def pace(self) -> LatencyModel:
        """The measured pace."""
        return self.work.pace
