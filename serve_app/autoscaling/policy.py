"""The class through which Ray Serve asks how many replicas a base should have, and what replicas report for it.

Owns the way from Ray's context to the decisions in `desired` and `sharing`, and back. Ray's context is read by its
attributes, so that nothing here imports Ray.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from serve_app.autoscaling.cluster import Cluster
from serve_app.autoscaling.desired import Decision, Load, ScalingRule, desired_replicas, needed_replicas
from serve_app.autoscaling.sharing import UNKNOWN_START_S, BaseNeed

if TYPE_CHECKING:
    from serve_app.settings import AutoscalingSettings

# The policy runs in Serve's controller, whose log has handlers for this name alone.
log = logging.getLogger("ray.serve.loraplex")

# The class that Serve makes of it.
POLICY = "serve_app.autoscaling.serve_policy:ServePolicy"

# Fields of a replica's report, each a number of seconds but the last two.
BACKLOG = "loraplex_backlog_s"
REQUEST = "loraplex_request_s"
START = "loraplex_start_s"
LOAD = "loraplex_load"
REQUESTS = "loraplex_requests"


def ray_settings(settings: AutoscalingSettings, *, gpus: float = 0.0) -> dict[str, Any]:
    """Return what Ray Serve is told about autoscaling of replicas that take `gpus` each."""
    ours = {"policy", "target_wait_s", "weight", "cluster_gpus"}
    fields = settings.model_dump(exclude_none=True, exclude=ours)
    if settings.policy == "ray":
        return fields
    policy = {
        "policy_function": POLICY,
        "policy_kwargs": {
            "target_wait_s": settings.target_wait_s,
            "gpus": gpus,
            "weight": settings.weight,
            "cluster_gpus": settings.cluster_gpus,
        },
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
    config: Any

    @property
    def total_num_requests(self) -> float:
        """Requests in handles and replicas."""
        ...

    @property
    def raw_metrics(self) -> Mapping[str, Mapping[Any, Sequence[Sample]]] | None:
        """The recent report of each running replica, by name."""
        ...


class PredictedWorkPolicy:
    """Ray Serve's way to the decisions, asked ten times a second for each base.

    Remembers, in Ray's policy state, how long a replica takes to start and a request to run, for the time when there
    is none to ask. Without a cluster, a base shares its GPUs with no other.
    """

    def __init__(
        self,
        target_wait_s: float,
        gpus: float = 0.0,
        weight: float = 1.0,
        cluster_gpus: float | None = None,
        cluster: Cluster | None = None,
    ) -> None:
        self._target_wait_s = target_wait_s
        self._said: Decision | None = None
        self._cluster = cluster or Cluster(lambda: 0.0)
        self._gpus, self._weight = gpus, weight
        self._cluster.join(self, BaseNeed(gpus, weight), cluster_gpus)

    def __call__(self, ctx: Context) -> tuple[int, dict[str, Any]]:
        """Return what Serve makes the number of replicas of that there should be, and what to remember."""
        reported = _newest(ctx.raw_metrics or {})
        start_s = max(reported.get(START, {}).values(), default=ctx.policy_state.get(START, 0.0))
        request_s = _mean(reported.get(REQUEST, {})) or ctx.policy_state.get(REQUEST, 0.0)
        load = _load(ctx, reported, request_s)
        rule = ScalingRule(
            self._target_wait_s,
            start_s,
            min_replicas=ctx.capacity_adjusted_min_replicas,
            max_replicas=ctx.capacity_adjusted_max_replicas,
        )
        alone = desired_replicas(load, rule)
        if load.requests and not load.running:
            # What a burst needs is known once one replica runs.
            alone = Decision(max(1, load.starting), "requests wait and no replica runs")
        decision = self._shared(ctx, alone, load, rule)
        self._say(decision, load, rule)
        return decision.replicas, {START: start_s, REQUEST: request_s}

    def _shared(self, ctx: Context, alone: Decision, load: Load, rule: ScalingRule) -> Decision:
        """Return the decision among all bases of the cluster; `alone` is what this one would have by itself."""
        need = BaseNeed(
            self._gpus,
            self._weight,
            least=rule.min_replicas,
            present=ctx.target_num_replicas,
            needed=needed_replicas(load, rule),
            wanted=alone.replicas,
            work_s=load.work_s,
            start_s=rule.start_s or UNKNOWN_START_S,
        )
        share = self._cluster.share(self, need, running=load.running, is_quiet=load.requests <= 0)
        if share.is_taken:
            # This context is made for one answer: the delays of the next are the configured ones again.
            now = {"downscale_delay_s": 0.0, "downscale_to_zero_delay_s": 0.0}
            ctx.config = ctx.config.model_copy(update=now)
        if share.replicas == alone.replicas:
            return alone
        return Decision(share.replicas, f"others need the GPUs; alone {alone.replicas}: {alone.reason}")

    def _say(self, decision: Decision, load: Load, rule: ScalingRule) -> None:
        is_news = self._said is None or decision.replicas != self._said.replicas
        if is_news and decision.replicas != load.running + load.starting:
            log.info(
                "wants %d replicas, has %d and %d starting in %.1f s: %s",
                decision.replicas, load.running, load.starting, rule.start_s, decision.reason,
            )  # fmt: skip
        self._said = decision


def is_ours(ctx: Context) -> bool:
    """Whether Ray's context is of a base with this policy."""
    return str(ctx.config.policy.policy_function) == POLICY


def _load(ctx: Context, reported: Mapping[str, Mapping[Any, float]], request_s: float) -> Load:
    # Requests that no replica has reported are in a handle's queue, or on their way.
    elsewhere = max(0.0, ctx.total_num_requests - sum(reported.get(REQUESTS, {}).values()))
    return Load(
        running=ctx.current_num_replicas,
        starting=max(0, ctx.target_num_replicas - ctx.current_num_replicas),
        work_s=sum(reported.get(BACKLOG, {}).values()) + elsewhere * request_s,
        requests=ctx.total_num_requests,
        arriving=sum(reported.get(LOAD, {}).values()),
    )


def _newest(metrics: Mapping[str, Mapping[Any, Sequence[Sample]]]) -> dict[str, dict[Any, float]]:
    """Return each replica's last value of each metric."""
    return {
        name: {replica: series[-1].value for replica, series in by_replica.items() if series}
        for name, by_replica in metrics.items()
    }


def _mean(values: Mapping[Any, float]) -> float:
    known = [value for value in values.values() if value > 0]
    return sum(known) / len(known) if known else 0.0
