"""How much work a worker has before it, in seconds, and how well that was predicted.

Owns the books: what is coming, what runs, what arrived recently and what passes took. Pure: every time is handed in.
Must not know the queue's order, threads or tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from serve_app.work import LatencyEstimator, LatencyModel

# The load recently is that of about the last minute.
LOAD_WINDOW_S = 60.0

# The newest request's share in the mean request.
NEWEST_SHARE = 0.1

# Until the first pass has been measured: a small GPU's, and a processor's.
GPU_GUESS = LatencyModel(fixed_s=0.5, unit_s=0.15)
CPU_GUESS = LatencyModel(fixed_s=0.2, unit_s=2.0)


def guess_of(device_type: str) -> LatencyModel:
    """Return the pace to assume of a device of which nothing has been measured yet."""
    return CPU_GUESS if device_type == "cpu" else GPU_GUESS


@dataclass(frozen=True, slots=True)
class LoadStats:
    """The load of one worker.

    `backlog_s` is how long it would take to finish everything that runs, waits or is still fetching adapters;
    `pending_fetches` counts the last kind. `request_s` is a recent request's time, before the first a typical one.
    `load` is the work that arrived recently, in seconds of work per second: over 1 is more than one replica can do.
    `predicted_s` and `busy_s` are sums over all finished passes: the prediction, and the time they took.
    """

    backlog_s: float
    pace: LatencyModel
    request_s: float
    load: float
    predicted_s: float
    busy_s: float
    pending_fetches: int = 0


@dataclass(frozen=True, slots=True)
class _Begun:
    """A pass that has begun: its work, its time on the device before `since_s`, which is None while it stands still."""

    units: float
    before_s: float
    since_s: float | None

    def active_s(self, now_s: float) -> float:
        return self.before_s + (0.0 if self.since_s is None else now_s - self.since_s)


class LoadTracker:
    """The books of one worker. Work is in the units of `serve_app.work`. Not thread-safe."""

    def __init__(self, guess: LatencyModel, *, typical_units: float = 1.0) -> None:
        """Start with nothing measured: with a guess of the pace, and of a request's work."""
        self._meter = LatencyEstimator(guess)
        self._coming: list[float] = []
        self._running: dict[int, _Begun] = {}
        self._mean_units = typical_units
        self._units_per_s = 0.0
        self._requests_per_s = 0.0
        self._counted_at = -math.inf
        self._predicted_s = 0.0
        self._busy_s = 0.0
        self._passes = 0

    @property
    def pace(self) -> LatencyModel:
        """The pace measured recently, or the guess."""
        return self._meter.pace

    @property
    def measured(self) -> LatencyModel | None:
        """The pace measured recently, or None before the first pass."""
        return self._meter.pace if self._passes else None

    def add_pending(self, units: float) -> None:
        """Note a request that is accepted and not yet in the queue."""
        self._coming.append(units)

    def remove_pending(self, units: float) -> None:
        """Note that a request expected is in the queue now, or gone."""
        self._coming.remove(units)

    def arrived(self, units: float, now_s: float) -> None:
        """Note a request that enters the queue."""
        self._decay(now_s)
        self._units_per_s += units / LOAD_WINDOW_S
        self._requests_per_s += 1 / LOAD_WINDOW_S
        self._mean_units += NEWEST_SHARE * (units - self._mean_units)

    def begun(self, units: float, now_s: float, run: int = 0) -> None:
        """Note that a pass begins; `run` tells passes apart where several have begun."""
        self._running[run] = _Begun(units, 0.0, now_s)

    def suspended(self, now_s: float, run: int = 0) -> None:
        """Note that a pass stands still, for others to go on."""
        if (begun := self._running.get(run)) is not None:
            self._running[run] = _Begun(begun.units, begun.active_s(now_s), None)

    def resumed(self, now_s: float, run: int = 0) -> None:
        """Note that a pass goes on."""
        if (begun := self._running.get(run)) is not None:
            self._running[run] = replace(begun, since_s=now_s)

    def ended(self, now_s: float, run: int = 0, *, denoise_s: float | None) -> None:
        """Note that a pass is over; `denoise_s` None where it failed or was cancelled, which teaches nothing."""
        begun = self._running.pop(run, None)
        if begun is None or denoise_s is None:
            return
        active_s = begun.active_s(now_s)
        self._predicted_s += self._meter.pace.seconds(begun.units)
        self._busy_s += active_s
        self._passes += 1
        self._meter.observe(units=begun.units, denoise_s=denoise_s, other_s=active_s - denoise_s)

    def backlog_s(self, waiting: Iterable[float], now_s: float) -> float:
        """Return the seconds of work ahead; `waiting` is the work of each request in the queue."""
        pace = self._meter.pace
        running_s = sum(max(0.0, pace.seconds(one.units) - one.active_s(now_s)) for one in self._running.values())
        return running_s + sum(map(pace.seconds, waiting)) + sum(map(pace.seconds, self._coming))

    def snapshot(self, waiting: Iterable[float], now_s: float) -> LoadStats:
        """Let the averages decay to `now_s`, and return the load then."""
        self._decay(now_s)
        pace = self._meter.pace
        return LoadStats(
            backlog_s=self.backlog_s(waiting, now_s),
            pace=pace,
            request_s=pace.seconds(self._mean_units),
            load=pace.unit_s * self._units_per_s + pace.fixed_s * self._requests_per_s,
            predicted_s=self._predicted_s,
            busy_s=self._busy_s,
            pending_fetches=len(self._coming),
        )

    def _decay(self, now_s: float) -> None:
        share = math.exp(-max(0.0, now_s - self._counted_at) / LOAD_WINDOW_S)
        self._units_per_s *= share
        self._requests_per_s *= share
        self._counted_at = now_s
