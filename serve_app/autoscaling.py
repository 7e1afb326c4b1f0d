"""How many replicas a base should have: decided from the work that waits.

Owns the decision, which is pure, and at the end the class through which Ray Serve asks for it. Must not know where
the numbers come from; Ray's own context is read by its attributes, so that nothing here imports Ray.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from serve_app.settings import AutoscalingSettings

# The policy runs in Serve's controller, whose log has handlers for this name alone.
log = logging.getLogger("ray.serve.loraplex")

# Fields of a replica's report, each a number of seconds but the last two.
BACKLOG = "loraplex_backlog_s"
REQUEST = "loraplex_request_s"
START = "loraplex_start_s"
LOAD = "loraplex_load"
REQUESTS = "loraplex_requests"


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
    bounded = min(max(needed.replicas, rule.min_replicas), rule.max_replicas)
    if bounded != needed.replicas:
        bound = f"{needed.reason}; from {rule.min_replicas} to {rule.max_replicas} are allowed"
        return Decision(bounded, bound)
    return needed


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


def ray_settings(settings: AutoscalingSettings) -> dict[str, Any]:
    """Return what Ray Serve is told about autoscaling."""
    fields = settings.model_dump(exclude_none=True, exclude={"policy", "target_wait_s"})
    if settings.policy == "ray":
        return fields
    policy = {
        "policy_function": f"{__name__}:{PredictedWorkPolicy.__name__}",
        "policy_kwargs": {"target_wait_s": settings.target_wait_s},
    }
    # The mean over the look-back would show a burst only once that has passed.
    return {**fields, "aggregation_function": "max", "policy": policy}


def replica_report(
    *, backlog_s: float, request_s: float, load: float, requests: int, start_s: float
) -> dict[str, float]:
    """Return a replica's report under the names that the policy reads."""
    return {BACKLOG: backlog_s, REQUEST: request_s, LOAD: load, REQUESTS: float(requests), START: start_s}


class Sample(Protocol):
    """One value that a replica reported, as Ray keeps it."""

    value: float


class Context(Protocol):
    """The part of Ray's `AutoscalingContext` that this policy reads."""

    current_num_replicas: int
    target_num_replicas: int
    capacity_adjusted_min_replicas: int
    capacity_adjusted_max_replicas: int
    policy_state: dict[str, Any]

    @property
    def total_num_requests(self) -> float:
        """Requests in handles and replicas."""
        ...

    @property
    def raw_metrics(self) -> Mapping[str, Mapping[Any, Sequence[Sample]]] | None:
        """The recent report of each running replica, by name."""
        ...


class PredictedWorkPolicy:
    """Ray Serve's way to `desired_replicas`, asked ten times a second for each base.

    Remembers, in Ray's policy state, how long a replica takes to start and a request to run, for the time when there
    is none to ask. Where requests wait and no replica runs, Serve does not ask but starts one.
    """

    def __init__(self, target_wait_s: float) -> None:
        self._target_wait_s = target_wait_s
        self._said: Decision | None = None

    def __call__(self, ctx: Context) -> tuple[int, dict[str, Any]]:
        """Return what Serve makes the number of replicas of that there should be, and what to remember."""
        reported = _newest(ctx.raw_metrics or {})
        start_s = max(reported.get(START, {}).values(), default=ctx.policy_state.get(START, 0.0))
        request_s = _mean(reported.get(REQUEST, {})) or ctx.policy_state.get(REQUEST, 0.0)
        requests = ctx.total_num_requests
        # Requests that no replica has reported are in a handle's queue, or on their way.
        elsewhere = max(0.0, requests - sum(reported.get(REQUESTS, {}).values()))
        load = Load(
            running=ctx.current_num_replicas,
            starting=max(0, ctx.target_num_replicas - ctx.current_num_replicas),
            work_s=sum(reported.get(BACKLOG, {}).values()) + elsewhere * request_s,
            requests=requests,
            arriving=sum(reported.get(LOAD, {}).values()),
        )
        rule = ScalingRule(
            self._target_wait_s,
            start_s,
            min_replicas=ctx.capacity_adjusted_min_replicas,
            max_replicas=ctx.capacity_adjusted_max_replicas,
        )
        decision = desired_replicas(load, rule)
        self._say(decision, load, rule)
        return decision.replicas, {START: start_s, REQUEST: request_s}

    def _say(self, decision: Decision, load: Load, rule: ScalingRule) -> None:
        is_news = self._said is None or decision.replicas != self._said.replicas
        if is_news and decision.replicas != load.running + load.starting:
            log.info(
                "wants %d replicas, has %d and %d starting in %.1f s: %s",
                decision.replicas, load.running, load.starting, rule.start_s, decision.reason,
            )  # fmt: skip
        self._said = decision


def _newest(metrics: Mapping[str, Mapping[Any, Sequence[Sample]]]) -> dict[str, dict[Any, float]]:
    """Return each replica's last value of each metric."""
    return {
        name: {replica: series[-1].value for replica, series in by_replica.items() if series}
        for name, by_replica in metrics.items()
    }


def _mean(values: Mapping[Any, float]) -> float:
    known = [value for value in values.values() if value > 0]
    return sum(known) / len(known) if known else 0.0
