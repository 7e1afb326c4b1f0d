"""The report of a load run: how a service answered the traffic sent to it.

Owns the figures, worked out from single answers alone, and their JSON form.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from serve_app.bench.traffic.workload_statistics import quantile

SCHEMA = 1
# Less than this is bookkeeping: nothing was waited for, nothing was rewritten.
LEAST_MS = 1.0
BASE_ALONE = "(base alone)"


@dataclass(frozen=True, slots=True)
class Sample:
    """One request: when it should have been sent and was, and what became of it; times from the start of the run.

    `status` is 0 and `code` names the failure where no HTTP answer came. `timing_ms` is the service's own account.
    """

    planned_s: float
    sent_s: float
    took_s: float
    adapters: tuple[str, ...]
    status: int
    code: str | None
    timing_ms: Mapping[str, float]

    @property
    def is_answered(self) -> bool:
        """Whether an image came back."""
        return self.code is None

    @property
    def name(self) -> str:
        """The adapters as one text."""
        return " + ".join(self.adapters) or BASE_ALONE


@dataclass(frozen=True, slots=True)
class AdapterLoad:
    """One adapter's requests, and the latencies of those that were answered."""

    name: str
    requests: int
    answered: int
    mean_s: float
    p95_s: float


@dataclass(frozen=True, slots=True)
class LoadReport:
    """Everything that one run found.

    `offered_per_s` is what was sent over the time of sending, `answered_per_s` images over the whole run. Latencies
    are of answered requests, from sending to the last byte. `swaps` and `fetches` are shares of the answered requests
    that waited for one at least a millisecond. `fairness` is Jain's index over the adapters' mean latencies: 1 where
    all wait alike, 1/n where one of n has all the delay. `late_s` is how far behind its plan the client itself was at
    most: unless it is far below the latencies, it distorts them.
    """

    command: str
    url: str
    requests: int
    answered: int
    offered_per_s: float
    answered_per_s: float
    took_s: float
    p50_s: float
    p95_s: float
    p99_s: float
    worst_s: float
    swaps: float
    fetches: float
    mean_ms: Mapping[str, float]
    errors: Mapping[str, int]
    fairness: float
    adapters: tuple[AdapterLoad, ...]
    late_s: float
    samples: tuple[Sample, ...] = dataclasses.field(repr=False)

    def to_json(self) -> str:
        """Return everything as indented JSON, single answers included; NaN and infinity become null."""
        fields = {"schema": SCHEMA, **dataclasses.asdict(self)}
        return json.dumps(_finite(fields), indent=2) + "\n"

    def points(self) -> list[tuple[str, list[float], list[float]]]:
        """Return what to draw: answered and failed requests by the time of sending."""
        return [
            (name, [s.sent_s for s in self.samples if s.is_answered is kind], [
                s.took_s for s in self.samples if s.is_answered is kind
            ])
            for name, kind in (("answered", True), ("failed", False))
        ]  # fmt: skip


def report_of(samples: Sequence[Sample], took_s: float, *, command: str, url: str) -> LoadReport:
    """Work out the figures of a run that took `took_s`."""
    answered = [sample for sample in samples if sample.is_answered]
    latencies = sorted(sample.took_s for sample in answered)
    adapters = _by_adapter(samples)
    sending_s = max((sample.sent_s for sample in samples), default=0.0)
    return LoadReport(
        command=command,
        url=url,
        requests=len(samples),
        answered=len(answered),
        # n requests span n - 1 gaps.
        offered_per_s=(len(samples) - 1) / sending_s if sending_s > 0 else math.nan,
        answered_per_s=len(answered) / took_s if took_s > 0 else math.nan,
        took_s=took_s,
        p50_s=quantile(latencies, 0.5),
        p95_s=quantile(latencies, 0.95),
        p99_s=quantile(latencies, 0.99),
        worst_s=quantile(latencies, 1.0),
        swaps=_share_over(answered, "swap"),
        fetches=_share_over(answered, "fetch"),
        mean_ms=_means(answered),
        errors=dict(Counter(sample.code for sample in samples if sample.code is not None)),
        fairness=_fairness([one.mean_s for one in adapters if one.answered]),
        adapters=adapters,
        late_s=max((sample.sent_s - sample.planned_s for sample in samples), default=0.0),
        samples=tuple(samples),
    )


def _by_adapter(samples: Sequence[Sample]) -> tuple[AdapterLoad, ...]:
    """Return every adapter's figures, the most asked for first."""
    by_name: dict[str, list[Sample]] = {}
    for sample in samples:
        by_name.setdefault(sample.name, []).append(sample)
    found: list[AdapterLoad] = []
    for name, own in by_name.items():
        latencies = sorted(sample.took_s for sample in own if sample.is_answered)
        mean_s = statistics.fmean(latencies) if latencies else math.nan
        found.append(AdapterLoad(name, len(own), len(latencies), mean_s, quantile(latencies, 0.95)))
    return tuple(sorted(found, key=lambda one: (-one.requests, one.name)))


def _share_over(samples: Sequence[Sample], stage: str) -> float:
    if not samples:
        return math.nan
    return sum(sample.timing_ms.get(stage, 0.0) >= LEAST_MS for sample in samples) / len(samples)


def _means(samples: Sequence[Sample]) -> dict[str, float]:
    stages = dict.fromkeys(stage for sample in samples for stage in sample.timing_ms)
    return {stage: statistics.fmean(sample.timing_ms.get(stage, 0.0) for sample in samples) for stage in stages}


def _fairness(means: Sequence[float]) -> float:
    squares = sum(mean * mean for mean in means)
    return sum(means) ** 2 / (len(means) * squares) if squares > 0 else math.nan


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in cast("Mapping[str, object]", value).items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in cast("Sequence[object]", value)]
    return value
