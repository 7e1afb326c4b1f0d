from __future__ import annotations

from serve_app.core import AdapterSpec
from serve_app.deployments.registry.usage import HALF_LIFE_S, MAX_NAMED, UsageTracker
from tests.clock import Clock


def spec(name: str) -> AdapterSpec:
    return AdapterSpec(name, "base", "0" * 16, "file.safetensors", "folder", "nowhere", 10)


def ids(tracker: UsageTracker) -> list[str]:
    return [each.id for each in tracker.most_used()]


def test_the_adapters_used_most_come_first() -> None:
    tracker = UsageTracker(Clock())
    for name in "abcbbc":
        tracker.note(spec(name))
    assert ids(tracker) == ["b", "c", "a"]
    tracker.note(spec("a"), 3)
    assert ids(tracker) == ["a", "b", "c"]


def test_uses_fade() -> None:
    clock = Clock()
    tracker = UsageTracker(clock)
    tracker.note(spec("old"), 3)
    clock.now = HALF_LIFE_S
    tracker.note(spec("new"))
    assert ids(tracker) == ["old", "new"]
    clock.now = 2 * HALF_LIFE_S
    tracker.note(spec("new"), 0)
    tracker.note(spec("newest"))
    assert ids(tracker) == ["newest", "old", "new"]


def test_of_thousands_of_adapters_the_most_used_are_remembered() -> None:
    tracker = UsageTracker(Clock())
    for index in range(5000):
        tracker.note(spec(f"adapter-{index}"))
        tracker.note(spec("hot"))
    assert ids(tracker)[0] == "hot"
    assert len(ids(tracker)) == MAX_NAMED
