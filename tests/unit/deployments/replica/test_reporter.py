from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from serve_app.catalog.replica_report import ActiveAdapter, AdapterUsage, ResidentAdapter
from serve_app.core import AdapterSpec
from serve_app.deployments.replica.reporter import ReplicaReporter


@dataclass
class Memory:
    """Host and device memory, as the store and the weights say it; both note what they are to forget."""

    held: list[str] = field(default_factory=list)
    cached: list[str] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)

    def resident(self) -> list[str]:
        return self.held

    def is_resident(self, key: str) -> bool:
        return key in self.held

    def forget(self, name: str) -> None:
        self.forgotten.append(name)


def lease(model: str, digest: str, revision: str = "r1", layers: int = 1) -> Any:
    spec = AdapterSpec(model, "demo/sd", revision, "f", "folder", model, 1)
    adapter = SimpleNamespace(digest=digest, coverage=SimpleNamespace(layers_matched=layers))
    return SimpleNamespace(spec=spec, adapter=adapter)


def state(*applied: tuple[str, float]) -> Any:
    return SimpleNamespace(waiting=1, running=2, backlog_s=3.0, applied=applied)


def reporter(memory: Memory, **settings: Any) -> ReplicaReporter:
    times = iter(range(1000))
    parts: Any = {"store": memory, "weights": memory, "clock": lambda: float(next(times))}
    return ReplicaReporter("r1", "demo/sd", "cpu", **parts, **settings)


def test_uses_are_counted_and_reading_is_none() -> None:
    told = reporter(Memory())
    told.note(lease("a", "d", layers=3), is_hit=False)
    assert told.report(state()).uses == (AdapterUsage("a@r1/f", 0, 0.0, 3),)
    for _ in range(2):
        told.note(lease("a", "d", layers=3), is_hit=True)
    report = told.report(state())
    assert report.uses == (AdapterUsage("a@r1/f", 2, 1.0, 3),)
    assert (report.waiting, report.running, report.backlog_s) == (1, 2, 3.0)


def test_an_adapter_shows_on_the_fastest_tier_it_is_on() -> None:
    told = reporter(Memory(["a@r1/f", "b@r1/f", "c@r1/f"], ["digest of a", "digest of b"]))
    for name in ("a", "b", "c", "gone"):
        told.note(lease(name, f"digest of {name}"), is_hit=True)
    report = told.report(state(("digest of a", 0.5), ("unknown", 1.0)))
    assert report.holdings == (
        ResidentAdapter("a@r1/f", "a", "applied"),
        ResidentAdapter("b@r1/f", "b", "device"),
        ResidentAdapter("c@r1/f", "c", "host"),
    )
    assert report.applied == (ActiveAdapter("a", 0.5),)


def test_all_revisions_of_an_adapter_are_forgotten() -> None:
    memory = Memory(["a@r2/f"])
    told = reporter(memory)
    for model, digest, revision in (("a", "one", "r1"), ("a", "two", "r2"), ("b", "three", "r1")):
        told.note(lease(model, digest, revision), is_hit=True)
    assert told.forget("a")
    assert memory.forgotten == ["a@r1/f", "one", "a@r2/f", "two"]
    assert not told.forget("b")


def test_the_least_recently_used_are_not_remembered() -> None:
    told = reporter(Memory(), max_remembered=2)
    for name in ("a", "b", "a", "c"):
        told.note(lease(name, name), is_hit=True)
    assert [use.key for use in told.report(state()).uses] == ["a@r1/f", "c@r1/f"]
