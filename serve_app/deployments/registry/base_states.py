"""What each base does: it runs, starts since when and for how much longer, waits for room, has failed or is stopped.

Owns that decision, which is pure, from what Serve says and how long starts took. Must not know Ray.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from serve_app.catalog.replica_report import BaseState
from serve_app.config import BaseModelConfig

if TYPE_CHECKING:
    from serve_app.deployments.registry.replica_counts import ReplicaCount

# So long Ray may take to make a process where there is room; longer means that there is none.
PLACING_S = 10.0
# A start that takes longer than the last one is expected to take this part of it more.
OVERDUE = 0.1


class BaseStates:
    """The states of all bases, by their ids; those that are served no more stay known, for what is still with them."""

    def __init__(
        self,
        counts: Callable[[], Awaitable[Mapping[str, ReplicaCount]]],
        start_times_s: Callable[[], Mapping[str, float]],
        *,
        clock: Callable[[], float],
    ) -> None:
        """`start_times_s` says how long the last start of each base took; `clock` is in seconds since 1970."""
        self._room: dict[str, str] = {}
        self._counts = counts
        self._start_times_s = start_times_s
        self._clock = clock

    def add(self, bases: Iterable[BaseModelConfig]) -> None:
        """Know these bases too, as they are configured now."""
        self._room |= {base.id: room_of(base) for base in bases}

    async def __call__(self) -> Mapping[str, BaseState]:
        """Return them, at most a second old."""
        counts, start_times_s, now_s = await self._counts(), self._start_times_s(), self._clock()
        return {
            base: state_of(counts.get(base), start_s=start_times_s.get(base), now_s=now_s, room=room)
            for base, room in self._room.items()
        }


def state_of(count: ReplicaCount | None, *, start_s: float | None, now_s: float, room: str) -> BaseState:
    """Return what a base does; None where Serve has not answered yet. `room` is what one replica takes."""
    if count is None:
        return BaseState("starting")
    if count.running:
        return BaseState("running", expected_s=0.0)
    if count.failure is not None:
        return BaseState("failed", reason=count.failure, is_absent=count.is_absent)
    if count.since_s is None:
        return BaseState("stopped", expected_s=start_s)
    lasted_s = max(0.0, now_s - count.since_s)
    if not count.is_placed and lasted_s > PLACING_S:
        return BaseState("waiting", count.since_s, start_s, f"no node has room for a replica, which takes {room}")
    expected_s = None if start_s is None else max(start_s - lasted_s, OVERDUE * start_s)
    return BaseState("starting", count.since_s, expected_s)


def is_service_ready(bases: Sequence[BaseModelConfig], states: Mapping[str, BaseState]) -> bool:
    """Whether every base that is required runs; where none is required, whether one runs or starts when it is asked."""

    def runs(base: BaseModelConfig) -> bool:
        return base.id in states and states[base.id].state == "running"

    required = [base for base in bases if base.required]
    if required:
        return all(map(runs, required))
    return any(base.autoscaling.min_replicas == 0 or runs(base) for base in bases)


def room_of(base: BaseModelConfig) -> str:
    """Return what one replica of a base takes of a node, in words."""
    replica = base.replica
    parts = {"GPU": replica.num_gpus, "CPU": replica.num_cpus, **replica.resources}
    return ", ".join(f"{amount:g} {name}" for name, amount in parts.items() if amount) or "nothing"


def counted_start_s(load_s: float, asked_at: float | None, *, now_s: float) -> float:
    """Return how long a start took that was asked for at `asked_at` and loaded for `load_s`.

    Of the way to a process `PLACING_S` count: what is beyond is a wait for room, which says nothing of the next start.
    """
    if asked_at is None:
        return load_s
    return load_s + min(max(0.0, now_s - asked_at - load_s), PLACING_S)
