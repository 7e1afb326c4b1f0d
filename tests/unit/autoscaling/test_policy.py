"""How many replicas a base should have, and the class through which Ray asks."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.serve.autoscaling_policy import _apply_autoscaling_config
from ray.serve.config import AutoscalingConfig

from serve_app.autoscaling.cluster import Cluster as GpuCluster
from serve_app.autoscaling.controller import ask_at_zero
from serve_app.autoscaling.desired import Load, ScalingRule, desired_replicas
from serve_app.autoscaling.policy import PredictedWorkPolicy, is_ours, ray_settings, replica_report
from serve_app.settings import AutoscalingSettings

RULE = ScalingRule(target_wait_s=10.0, max_replicas=20)
IDLE = Load(running=1, starting=0, work_s=0.0, requests=0.0, arriving=0.0)


def wanted(load: Load, rule: ScalingRule = RULE) -> int:
    return desired_replicas(load, rule).replicas


def test_a_burst_is_met_in_one_step() -> None:
    assert wanted(Load(running=1, starting=0, work_s=95.0, requests=40, arriving=0.5)) == 10


def test_replicas_that_are_starting_are_not_asked_for_again() -> None:
    assert wanted(Load(running=1, starting=9, work_s=95.0, requests=40, arriving=0.5)) == 10


def test_work_that_is_done_before_a_new_replica_has_started_asks_for_none() -> None:
    load = Load(running=1, starting=0, work_s=40.0, requests=5, arriving=0.1)
    assert wanted(load) == 4
    assert wanted(load, ScalingRule(10.0, start_s=60.0, max_replicas=20)) == 1
    assert wanted(load, ScalingRule(10.0, start_s=15.0, max_replicas=20)) == 3


def test_work_that_goes_on_arriving_while_a_replica_starts_is_counted() -> None:
    load = Load(running=1, starting=0, work_s=20.0, requests=5, arriving=3.0)
    assert wanted(load, ScalingRule(10.0, start_s=20.0, max_replicas=20)) == 6


def test_a_request_however_long_is_no_work_for_two_replicas() -> None:
    long = Load(running=1, starting=0, work_s=90.0, requests=2, arriving=0.0)
    assert wanted(long) == 2
    assert desired_replicas(long, RULE).reason == (
        "90.0 s of work against 10 s before each replica, in 2 requests, each for one replica"
    )
    assert wanted(replace(long, requests=1)) == 1
    assert wanted(replace(long, arriving=1.5), replace(RULE, start_s=20.0)) == 5


def test_arriving_work_keeps_its_replicas_although_nothing_queues() -> None:
    assert wanted(Load(running=4, starting=0, work_s=3.0, requests=1, arriving=2.9)) == 4


def test_down_it_goes_by_a_quarter_at_a_time_and_by_one_at_least() -> None:
    assert wanted(Load(running=16, starting=0, work_s=1.0, requests=1, arriving=0.1)) == 12
    assert wanted(Load(running=2, starting=0, work_s=1.0, requests=1, arriving=0.1)) == 1


def test_the_last_replica_goes_only_when_nothing_is_there_to_do() -> None:
    assert wanted(IDLE) == 0
    assert wanted(Load(running=1, starting=0, work_s=0.0, requests=1, arriving=0.0)) == 1
    assert wanted(IDLE, ScalingRule(10.0, min_replicas=1)) == 1


def test_a_decision_says_why() -> None:
    decision = desired_replicas(Load(1, 0, work_s=95.0, requests=40, arriving=0.5), ScalingRule(10.0, max_replicas=3))
    assert decision.replicas == 3
    assert decision.reason == "95.0 s of work against 10 s before each replica; from 0 to 3 are allowed"


loads = st.builds(
    Load,
    running=st.integers(1, 50),
    starting=st.integers(0, 20),
    work_s=st.floats(0, 5000),
    requests=st.floats(0, 500),
    arriving=st.floats(0, 50),
)
rules = st.builds(
    ScalingRule,
    target_wait_s=st.floats(0.5, 60),
    start_s=st.floats(0, 300),
    min_replicas=st.integers(0, 3),
    max_replicas=st.integers(3, 100),
)


@given(loads, rules)
def test_the_bounds_hold(load: Load, rule: ScalingRule) -> None:
    assert rule.min_replicas <= wanted(load, rule) <= rule.max_replicas


@given(loads, rules, st.floats(0, 1000))
def test_more_work_never_asks_for_fewer(load: Load, rule: ScalingRule, more_s: float) -> None:
    heavier = Load(load.running, load.starting, load.work_s + more_s, load.requests + 1, load.arriving)
    assert wanted(heavier, rule) >= wanted(load, rule)


@given(loads, rules, st.floats(0, 300))
def test_a_slower_start_never_raises_what_the_present_work_asks_for(
    load: Load, rule: ScalingRule, more_s: float
) -> None:
    alone = Load(load.running, load.starting, load.work_s, load.requests, arriving=0.0)
    slower = ScalingRule(rule.target_wait_s, rule.start_s + more_s, rule.min_replicas, rule.max_replicas)
    assert wanted(alone, slower) <= wanted(alone, rule)


@dataclass
class Value:
    """One sample as Ray keeps it."""

    value: float


@dataclass
class Asked:
    """Ray's context, as far as the policy reads it."""

    current_num_replicas: int = 1
    target_num_replicas: int = 1
    capacity_adjusted_min_replicas: int = 0
    capacity_adjusted_max_replicas: int = 20
    total_num_requests: float = 0.0
    raw_metrics: dict[str, dict[str, list[Value]]] | None = None
    policy_state: dict[str, Any] = field(default_factory=dict)
    config: AutoscalingConfig | None = None


def reported(**replicas: dict[str, float]) -> dict[str, dict[str, list[Value]]]:
    """Return Ray's shape of what replicas reported, with an older value before each."""
    names = next(iter(replicas.values()))
    return {name: {key: [Value(1e9), Value(report[name])] for key, report in replicas.items()} for name in names}


def report(backlog_s: float = 0.0, requests: int = 0, load: float = 0.0, start_s: float = 0.0) -> dict[str, float]:
    return replica_report(backlog_s=backlog_s, request_s=2.0, load=load, requests=requests, start_s=start_s)


def test_requests_that_no_replica_knows_of_yet_count_as_the_mean_request() -> None:
    replicas, _ = PredictedWorkPolicy(target_wait_s=10.0)(
        Asked(total_num_requests=41, raw_metrics=reported(a=report(backlog_s=32.0, requests=16)))
    )
    assert replicas == 9  # 32 s there and 25 requests of 2 s elsewhere


def test_a_request_on_its_way_from_a_handle_to_a_replica_is_counted_once() -> None:
    metrics = reported(a=report(backlog_s=20.0, requests=10), b=report(backlog_s=20.0, requests=10))
    policy = PredictedWorkPolicy(target_wait_s=10.0)
    asked = Asked(current_num_replicas=2, target_num_replicas=4, total_num_requests=20, raw_metrics=metrics)
    assert policy(asked)[0] == 4


def test_what_a_request_takes_is_remembered_while_no_replica_runs() -> None:
    policy = PredictedWorkPolicy(target_wait_s=10.0)
    _, state = policy(Asked(total_num_requests=1, raw_metrics=reported(a=report(start_s=7.0))))
    replicas, _ = policy(Asked(total_num_requests=20, raw_metrics={}, policy_state=state))
    assert replicas == 4  # 40 s of work, of which one replica does 7 while others start


def test_a_base_that_nobody_asked_for_yet_keeps_one_replica_while_it_has_requests() -> None:
    assert PredictedWorkPolicy(target_wait_s=10.0)(Asked(total_num_requests=3, raw_metrics=None))[0] == 1


@pytest.mark.parametrize("policy", ["predicted_work", "ray"])
def test_ray_accepts_what_it_is_told(policy: str) -> None:
    chosen = AutoscalingSettings.model_validate({"policy": policy, "target_wait_s": 3.0, "max_replicas": 4})
    config = AutoscalingConfig(**ray_settings(chosen))
    assert config.max_replicas == 4
    assert config.policy.is_default_policy_function() == (policy == "ray")
    if policy == "predicted_work":
        # As Serve's controller makes it, from the pickled class.
        made = config.policy.get_policy()(**config.policy.policy_kwargs)
        assert made(Asked(total_num_requests=9, raw_metrics=reported(a=report(backlog_s=9.0))))[0] == 9


class Cluster:
    """Serve's controller with the policies of bases that start from zero, asked by Serve's own rules."""

    def __init__(self, gpus: float, **bases: dict[str, Any]) -> None:
        ask_at_zero(is_ours)
        self.now_s = 0.0
        shared = GpuCluster(lambda: gpus, clock=lambda: self.now_s)
        self.contexts: dict[str, Asked] = {}
        self._policies: dict[str, Any] = {}
        for name, settings in bases.items():
            chosen = AutoscalingSettings.model_validate({"min_replicas": 0, "max_replicas": 4, **settings})
            config = AutoscalingConfig(**ray_settings(chosen, gpus=1.0))
            policy = PredictedWorkPolicy(**config.policy.policy_kwargs, cluster=shared)
            self._policies[name] = _apply_autoscaling_config(policy)
            self.contexts[name] = Asked(0, 0, 0, 4, config=config)

    def remove(self, name: str) -> None:
        del self._policies[name], self.contexts[name]

    def rounds(self, count: int, **requests: int) -> dict[str, int]:
        """Ask all policies so often, with so many requests; return the targets. Replicas start where a test says so."""
        for _ in range(count):
            self.now_s += 0.1
            for name, base in self.contexts.items():
                base.total_num_requests = requests.get(name, 0)
                metrics = reported(a=report(2.0 * base.total_num_requests, int(base.total_num_requests), start_s=5.0))
                ctx = replace(base, raw_metrics=metrics if base.current_num_replicas else None)
                base.target_num_replicas, base.policy_state = self._policies[name](ctx)
                base.current_num_replicas = min(base.current_num_replicas, base.target_num_replicas)
        return {name: base.target_num_replicas for name, base in self.contexts.items()}

    def start(self, name: str) -> None:
        self.contexts[name].current_num_replicas = self.contexts[name].target_num_replicas


def test_an_idle_base_gives_way_at_once_and_not_after_its_delay() -> None:
    cluster = Cluster(1, a={}, b={})
    assert cluster.rounds(5, a=1) == {"a": 1, "b": 0}
    cluster.start("a")
    assert cluster.rounds(60) == {"a": 1, "b": 0}
    assert cluster.rounds(2, b=1) == {"a": 0, "b": 1}


def test_bases_that_have_work_all_the_time_take_turns_once_each_has_stayed() -> None:
    cluster = Cluster(1, a={}, b={})
    cluster.rounds(1, a=1)
    for has, waits in (("a", "b"), ("b", "a")):
        cluster.start(has)
        # Four starts of 5 s; Serve starts nothing that would take the place of another.
        assert cluster.rounds(199, a=1, b=1) == {has: 1, waits: 0}
        assert cluster.rounds(4, a=1, b=1) == {has: 0, waits: 1}


def test_without_a_shortage_the_delays_are_the_configured_ones() -> None:
    cluster = Cluster(2, a={}, b={})
    cluster.rounds(1, a=1)
    cluster.start("a")
    assert cluster.rounds(200, b=1) == {"a": 1, "b": 1}


def test_replicas_that_find_no_room_yet_are_asked_for_where_the_cluster_may_grow() -> None:
    now, later = Cluster(1, a={"cluster_gpus": 1}), Cluster(1, a={})
    for cluster, target in ((now, 1), (later, 4)):
        cluster.rounds(1, a=40)
        cluster.start("a")
        assert cluster.rounds(5, a=40) == {"a": target}


def test_a_base_that_is_gone_claims_nothing() -> None:
    cluster = Cluster(1, a={}, b={})
    cluster.rounds(1, a=1)
    cluster.start("a")
    cluster.rounds(2, b=1)
    cluster.remove("b")
    assert cluster.rounds(100) == {"a": 1}


@pytest.mark.parametrize(("requests", "replicas"), [(0, 0), (1, 1), (40, 1)])
def test_from_zero_one_replica_starts_at_once(requests: int, replicas: int) -> None:
    config = AutoscalingConfig(**ray_settings(AutoscalingSettings(min_replicas=0, max_replicas=20, upscale_delay_s=60)))
    policy = config.policy.get_policy()(**config.policy.policy_kwargs)
    waiting: Any = Asked(0, 0, total_num_requests=requests, config=config)
    assert _apply_autoscaling_config(policy)(waiting)[0] == replicas
