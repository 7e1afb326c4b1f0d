"""How many replicas a base needs by itself: decided from the work that waits.

Owns the decision, which is pure. Must not know where the numbers come from, or that other bases want GPUs too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Load:
    """The load of a base, and its replicas.

    `running` replicas work, `starting` ones were asked for and do not yet. `work_s` is all predicted work of requests
    that were accepted and not finished, in seconds of one replica; `requests` counts them. `arriving` is the work
    that arrives, in seconds of work per second.
    """

    running: int
    starting: int
    work_s: float
    requests: float
    arriving: float


@dataclass(frozen=True, slots=True)
class ScalingRule:
    """The target of a base: `target_wait_s` of work before each replica, at most `max_load` of its time used.

    A replica takes `start_s` to start. Down it goes by `max_drop` of the replicas at a time, and at least by one.
    """

    target_wait_s: float
    start_s: float = 0.0
    min_replicas: int = 0
    max_replicas: int = 1
    max_load: float = 0.85
    max_drop: float = 0.25


@dataclass(frozen=True, slots=True)
class Decision:
    """How many replicas there should be, and why."""

    replicas: int
    reason: str


def desired_replicas(load: Load, rule: ScalingRule) -> Decision:
    """Return how many replicas a base should have now.

    Up at once to what the work needs, counting only the work that would still be there when a new replica has
    started; down a little at a time, never below what the arriving work needs; to zero where there is nothing to do.
    """
    present = load.running + load.starting
    needed = _needed(load, rule)
    if needed.replicas < present:
        lowest = max(needed.replicas, present - max(1, int(present * rule.max_drop)))
        needed = Decision(lowest, needed.reason)
    bounded = _bounded(needed.replicas, rule)
    if bounded != needed.replicas:
        bound = f"{needed.reason}; from {rule.min_replicas} to {rule.max_replicas} are allowed"
        return Decision(bounded, bound)
    return needed


def needed_replicas(load: Load, rule: ScalingRule) -> int:
    """Return how many replicas a base has work for now, however many it has."""
    return _bounded(_needed(load, rule).replicas, rule)


def _bounded(replicas: int, rule: ScalingRule) -> int:
    return min(max(replicas, rule.min_replicas), rule.max_replicas)


def _needed(load: Load, rule: ScalingRule) -> Decision:
    if load.requests <= 0 and load.work_s <= 0:
        busy = math.ceil(load.arriving / rule.max_load - 1e-9) if load.running + load.starting > 1 else 0
        return Decision(busy, "nothing waits and nothing runs")
    for_load = math.ceil(load.arriving / rule.max_load - 1e-9)
    for_wait, useful = _for_wait(load, rule), _useful(load, rule)
    if min(for_wait, useful) > for_load:
        reason = f"{load.work_s:.1f} s of work against {rule.target_wait_s:g} s before each replica"
        if useful < for_wait:
            return Decision(useful, f"{reason}, in {load.requests:g} requests, each for one replica")
        return Decision(for_wait, reason)
    return Decision(max(1, for_load), f"work arrives at {load.arriving:.2f} s a second")


def _for_wait(load: Load, rule: ScalingRule) -> int:
    """Return how many replicas leave each at most the target wait, once those that are not there yet have started."""
    present = load.running + load.starting
    kept = math.ceil(load.work_s / rule.target_wait_s - 1e-9)
    if kept <= present:
        return kept
    # Before a further one has started, those that run finish some of it, and more arrives.
    left_s = load.work_s + (load.arriving - load.running) * rule.start_s
    return max(present, math.ceil(left_s / rule.target_wait_s - 1e-9))


def _useful(load: Load, rule: ScalingRule) -> int:
    """Return how many replicas would have something to do: a request, however long, is one replica's."""
    arriving = load.arriving * rule.start_s / rule.target_wait_s
    return math.ceil(load.requests - 1e-9) + math.ceil(arriving - 1e-9)
