"""A replica's report to the routers on its work, and the small form in which it travels.

Owns the notes behind `record_routing_stats`. Each change is sent to every process that routes, so it is small and its
numbers are rough; which adapters a replica holds is not in it, since Ray's multiplexed ids say that. Must not know Ray,
torch, the store or the worker. Runs on one event loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from serve_app.core import GenerationRequest
from serve_app.routing.cost import BASE_ALONE, STALLED_S, composition_of, tag_of
from serve_app.work import LatencyModel

# A replica reports at least this often, so that one that has fallen silent is noticed.
HEARTBEAT_S = 5.0
# Seconds of work are rounded to so many.
GRAIN_S = 0.1


def request_tag(request: GenerationRequest) -> str:
    """Return the tag of a request; the parts of one that is drawn in several places differ by their seed."""
    return tag_of(f"{request.request_id}/{request.seed}/{request.num_images}")


@dataclass(frozen=True, slots=True)
class DeviceLoad:
    """The figures of the device thread.

    `backlog_s` is the predicted time of all that runs, waits or still fetches its adapters. `progress` is any number
    that changes while it works, `is_busy` whether it has something to do. One that `has_failed` is to be replaced.
    """

    backlog_s: float
    pace: LatencyModel
    progress: float
    is_busy: bool
    has_failed: bool = False


@dataclass(frozen=True, slots=True)
class ReplicaStats:
    """The work of a replica, as its report number `sequence` tells it.

    `ahead_s` counts the requests in `counted`, by their tags; `fused` has the tags of the compositions that are in its
    weights or will be for these requests.
    """

    sequence: int
    ahead_s: float
    pace: LatencyModel
    fused: frozenset[str] = frozenset((BASE_ALONE,))
    counted: frozenset[str] = frozenset()


def encode(stats: ReplicaStats) -> dict[str, Any]:
    """Return the stats in the form that travels: plain numbers and strings, rounded."""
    return {
        "seq": stats.sequence,
        "ahead": _grained(stats.ahead_s),
        "pace": (float(f"{stats.pace.fixed_s:.1e}"), float(f"{stats.pace.unit_s:.1e}")),
        "fused": " ".join(sorted(stats.fused)),
        "counted": " ".join(sorted(stats.counted)),
    }


def decode(wire: Mapping[str, Any]) -> ReplicaStats | None:
    """Read what travelled; None where a replica has reported nothing yet, or speaks another version's language."""
    try:
        pace = LatencyModel(*map(float, wire["pace"]))
        fused, counted = frozenset(wire["fused"].split()), frozenset(wire["counted"].split())
        return ReplicaStats(int(wire["seq"]), float(wire["ahead"]), pace, fused, counted)
    except (LookupError, TypeError, ValueError, AttributeError):
        return None


class RoutingStatsCollector:
    """One replica's notes for the routers."""

    def __init__(self, *, clock: Callable[[], float], deprioritize_after_s: float = 60.0) -> None:
        """Start with nothing known; a busy device may show no progress for `deprioritize_after_s`."""
        self._clock = clock
        self._stall_after_s = deprioritize_after_s
        self._accepted: dict[str, str] = {}
        self._last = BASE_ALONE
        self._progress: tuple[float, float] = (0.0, clock())
        self._reported: dict[str, Any] = {"seq": 0}
        self._reported_at = clock()

    @contextmanager
    def accepted(self, request: GenerationRequest) -> Generator[None]:
        """Count a request as this replica's work until the block ends."""
        tag = request_tag(request)
        self._accepted[tag] = composition_of(request)
        try:
            yield
        finally:
            # The one accepted last decides what the weights hold once all is done.
            self._last = self._accepted.pop(tag, self._last)

    def snapshot(self, load: DeviceLoad) -> dict[str, Any]:
        """Return what routers are to know: the same object, and number, as long as nothing has changed."""
        stats = ReplicaStats(
            sequence=self._reported["seq"],
            ahead_s=STALLED_S if self._is_stalled(load) else load.backlog_s,
            pace=load.pace,
            fused=frozenset((self._last, *self._accepted.values())),
            counted=frozenset(self._accepted),
        )
        encoded = encode(stats)
        now_s = self._clock()
        if encoded != self._reported or now_s - self._reported_at >= HEARTBEAT_S:
            self._reported = {**encoded, "seq": stats.sequence + 1}
            self._reported_at = now_s
        return self._reported

    def _is_stalled(self, load: DeviceLoad) -> bool:
        if load.has_failed:
            return True
        progress, since_s = self._progress
        if not load.is_busy or load.progress != progress:
            self._progress = (load.progress, self._clock())
            return False
        return self._clock() - since_s > self._stall_after_s


def _grained(seconds: float) -> float:
    """Round to a tenth of a second, and to two digits where that is coarser."""
    grain = max(GRAIN_S, 10.0 ** math.floor(math.log10(seconds)) / 10) if seconds > 0 else GRAIN_S
    return round(round(seconds / grain) * grain, 3)
