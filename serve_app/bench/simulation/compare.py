"""Policies against one another over seeds, and how many replicas a target needs.

Owns the figures and their spreads. Must not know how they are shown.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from serve_app.bench.measuring.options import BenchmarkRefused
from serve_app.bench.simulation.profile import Profile
from serve_app.bench.simulation.routers import POLICIES, Policy
from serve_app.bench.simulation.simulator import Fleet, Run, simulate
from serve_app.bench.traffic.workload import Workload
from serve_app.bench.traffic.workload_statistics import quantile

SCHEMA = 1
# No search goes beyond so many times the work offered: a request slow there is slow alone.
MOST_OVER_OFFERED = 16


@dataclass(frozen=True, slots=True)
class Figures:
    """The results of one seed's requests over all bases.

    `fewest_*` are of the requests for the fewest images that were asked for, `most_*` of those for the most.
    `slowdown` is the largest of a request's time over what it would take alone. `fetches` and `swaps` are for each
    request, `busy` is the share of paid time in passes, `replicas` the most at once, `replica_hours` what was paid for.
    """

    requests: int
    p50_s: float
    p95_s: float
    p99_s: float
    mean_s: float
    worst_s: float
    fewest_p95_s: float
    fewest_p99_s: float
    most_mean_s: float
    most_p95_s: float
    most_p99_s: float
    slowdown: float
    fetches: float
    disk_reads: float
    swaps: float
    busy: float
    replicas: int
    replica_hours: float


@dataclass(frozen=True, slots=True)
class Spread:
    """A mean over seeds, and the least and most of them."""

    mean: float
    least: float
    most: float


@dataclass(frozen=True, slots=True)
class PolicyResult:
    """One policy's figures, seed by seed, and its p95 over that of the first policy on the same traffic."""

    policy: str
    seeds: tuple[Figures, ...]
    p95_over_first: tuple[float, ...]

    def spread(self, figure: str) -> Spread:
        """Return how a figure, named as in `Figures`, spreads over the seeds."""
        return spread_of([float(getattr(one, figure)) for one in self.seeds])


@dataclass(frozen=True, slots=True)
class Comparison:
    """Policies on the same traffic with the same replicas."""

    command: str
    profile: str
    unproved: tuple[str, ...]
    results: tuple[PolicyResult, ...]

    def to_json(self) -> str:
        """Return everything as indented JSON."""
        return json.dumps({"schema": SCHEMA, **dataclasses.asdict(self)}, indent=2) + "\n"


@dataclass(frozen=True, slots=True)
class Need:
    """How many replicas one base needs under a policy.

    `curve` pairs numbers of replicas that were tried with the p95 of each seed; `busy` is the mean share of time in
    passes with the number needed, None where none is enough.
    """

    policy: str
    base_id: str
    replicas: int | None
    busy: float | None
    curve: tuple[tuple[int, tuple[float, ...]], ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """How many GPUs a traffic needs at a p95."""

    command: str
    profile: str
    unproved: tuple[str, ...]
    p95_s: float
    needs: tuple[Need, ...]

    def total(self, policy: str) -> int | None:
        """Return the GPUs of all bases, None where a base cannot be served as asked."""
        counts = [need.replicas for need in self.needs if need.policy == policy]
        return None if None in counts else sum(count for count in counts if count is not None)

    def to_json(self) -> str:
        """Return everything as indented JSON."""
        return json.dumps({"schema": SCHEMA, **dataclasses.asdict(self)}, indent=2) + "\n"


Say = Callable[[str], None]


def policies_named(names: Sequence[str]) -> tuple[Policy, ...]:
    """Return policies by name, all of them for none.

    Raises:
        BenchmarkRefused: there is no such policy.
    """
    known = {policy.name: policy for policy in POLICIES}
    for name in names:
        if name not in known:
            raise BenchmarkRefused(f"there is no policy '{name}'; there are {', '.join(known)}")
    return tuple(known[name] for name in names) if names else POLICIES


def compare(
    workloads: Sequence[Workload],
    profile: Profile,
    policies: Sequence[Policy],
    fleets: Mapping[str, Fleet],
    *,
    noise: float = 0.0,
    command: str = "",
    say: Say = lambda text: None,
) -> Comparison:
    """Play each seed's traffic with every policy; `fleets` says how many replicas each base has."""
    by_policy: dict[str, list[Figures]] = {policy.name: [] for policy in policies}
    for seed, workload in enumerate(workloads):
        parts = [(base_id, workload.of_base(base_id)) for base_id in workload.bases]
        for policy in policies:
            say(f"seed {seed}: {policy.name}")
            runs = [simulate(part, profile, policy, fleets[base], seed=seed, noise=noise) for base, part in parts]
            by_policy[policy.name].append(figures_of(runs))
    first = by_policy[policies[0].name]
    results = tuple(
        PolicyResult(name, tuple(found), tuple(a.p95_s / b.p95_s for a, b in zip(found, first, strict=True)))
        for name, found in by_policy.items()
    )
    return Comparison(command, profile.name, profile.unproved, results)


def plan(
    workloads: Sequence[Workload],
    profile: Profile,
    policies: Sequence[Policy],
    p95_s: float,
    *,
    noise: float = 0.0,
    command: str = "",
    say: Say = lambda text: None,
) -> Plan:
    """Find the fewest replicas of every base at which each seed's p95 is at most `p95_s`."""
    needs: list[Need] = []
    for policy in policies:
        for base_id in sorted({base for workload in workloads for base in workload.bases}):
            say(f"{policy.name}: {base_id}")
            parts = [part for workload in workloads if (part := workload.of_base(base_id)).arrivals]
            needs.append(_Search(parts, profile, policy, p95_s, noise).need(base_id))
    return Plan(command, profile.name, profile.unproved, p95_s, tuple(needs))


class _Search:
    """The fewest replicas for one base; the counts tried are kept for the curve."""

    def __init__(self, parts: Sequence[Workload], profile: Profile, policy: Policy, p95_s: float, noise: float) -> None:
        self._parts, self._profile, self._policy = parts, profile, policy
        self._p95_s, self._noise = p95_s, noise
        self._tried: dict[int, tuple[Figures, ...]] = {}

    def need(self, base_id: str) -> Need:
        """Double until it is enough, then halve the gap; p95 is taken to fall as replicas are added."""
        upper = 1
        while not self._is_enough(upper):
            if upper >= self._most():
                return Need(self._policy.name, base_id, None, None, self._curve())
            upper *= 2
        lower = upper // 2
        while upper - lower > 1:
            middle = (lower + upper) // 2
            lower, upper = (lower, middle) if self._is_enough(middle) else (middle, upper)
        busy = statistics.fmean(one.busy for one in self._tried[upper])
        return Need(self._policy.name, base_id, upper, busy, self._curve())

    def _is_enough(self, replicas: int) -> bool:
        self._tried[replicas] = tuple(
            figures_of([simulate(part, self._profile, self._policy, Fleet(replicas), seed=seed, noise=self._noise)])
            for seed, part in enumerate(self._parts)
        )
        return all(one.p95_s <= self._p95_s for one in self._tried[replicas])

    def _most(self) -> int:
        """Return more replicas than the busiest moment can keep at work."""
        one = self._tried[1][0]
        offered = one.busy * one.replica_hours * 3600 / max(self._parts[0].duration_s, 1.0)
        return max(8, math.ceil(MOST_OVER_OFFERED * offered))

    def _curve(self) -> tuple[tuple[int, tuple[float, ...]], ...]:
        return tuple((count, tuple(one.p95_s for one in self._tried[count])) for count in sorted(self._tried))


def figures_of(runs: Sequence[Run]) -> Figures:
    """Return the figures of one seed over its bases."""
    latencies = array("d")
    for run in runs:
        latencies.extend(run.latencies_s)
    ordered = sorted(latencies)
    images = [count for run in runs for count in run.images]
    fewest, most = _of(latencies, images, min(images)), _of(latencies, images, max(images))
    alone_s = [seconds for run in runs for seconds in run.alone_s]
    count, paid_s = len(ordered), sum(run.replica_s for run in runs)
    return Figures(
        requests=count,
        p50_s=quantile(ordered, 0.5),
        p95_s=quantile(ordered, 0.95),
        p99_s=quantile(ordered, 0.99),
        mean_s=statistics.fmean(ordered),
        worst_s=ordered[-1],
        fewest_p95_s=quantile(fewest, 0.95),
        fewest_p99_s=quantile(fewest, 0.99),
        most_mean_s=statistics.fmean(most),
        most_p95_s=quantile(most, 0.95),
        most_p99_s=quantile(most, 0.99),
        slowdown=max(took / alone for took, alone in zip(latencies, alone_s, strict=True) if alone),
        fetches=sum(run.fetches for run in runs) / count,
        disk_reads=sum(run.disk_reads for run in runs) / count,
        swaps=sum(run.swaps for run in runs) / count,
        busy=sum(run.busy_s for run in runs) / paid_s,
        replicas=sum(run.most for run in runs),
        replica_hours=paid_s / 3600,
    )


def _of(latencies: Sequence[float], images: Sequence[int], count: int) -> list[float]:
    return sorted(took for took, of in zip(latencies, images, strict=True) if of == count)


def spread_of(values: Sequence[float]) -> Spread:
    """Return the mean, least and most of some values."""
    return Spread(statistics.fmean(values), min(values), max(values))
