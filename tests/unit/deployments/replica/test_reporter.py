from __future__ import annotations

from serve_app.catalog.replica_report import ActiveAdapter, AdapterUsage, ResidentAdapter
from serve_app.core import AdapterSpec
from serve_app.deployments.replica.reporter import AdapterUsageLog


def spec(model: str, revision: str = "r1") -> AdapterSpec:
    return AdapterSpec(model, "demo/sd", revision, "f", "folder", model, 1)


def book(**settings: int) -> AdapterUsageLog:
    times = iter(range(1000))
    return AdapterUsageLog(clock=lambda: float(next(times)), **settings)


def test_uses_are_counted_and_reading_is_none() -> None:
    uses = book()
    uses.note(spec("a"), digest="d", layers_matched=3, is_hit=False)
    assert uses.uses() == (AdapterUsage("a@r1/f", 0, 0.0, 3),)
    for _ in range(2):
        uses.note(spec("a"), digest="d", layers_matched=3)
    assert uses.uses() == (AdapterUsage("a@r1/f", 2, 1.0, 3),)


def test_an_adapter_shows_on_the_fastest_tier_it_is_on() -> None:
    uses = book()
    for name in ("a", "b", "c", "gone"):
        uses.note(spec(name), digest=f"digest of {name}", layers_matched=1)
    held = uses.holdings([("digest of a", 0.5)], ["digest of a", "digest of b"], ["a@r1/f", "b@r1/f", "c@r1/f"])
    assert held == (
        ResidentAdapter("a@r1/f", "a", "applied"),
        ResidentAdapter("b@r1/f", "b", "device"),
        ResidentAdapter("c@r1/f", "c", "host"),
    )
    assert uses.applied([("digest of a", 0.5), ("unknown", 1.0)]) == (ActiveAdapter("a", 0.5),)


def test_all_revisions_of_an_adapter_are_found() -> None:
    uses = book()
    uses.note(spec("a"), digest="one", layers_matched=1)
    uses.note(spec("a", "r2"), digest="two", layers_matched=1)
    uses.note(spec("b"), digest="three", layers_matched=1)
    assert uses.keys_of("a") == ("a@r1/f", "a@r2/f")
    assert uses.digests_of("a") == ("one", "two")


def test_the_book_forgets_the_least_recently_used() -> None:
    uses = book(max_remembered=2)
    for name in ("a", "b", "a", "c"):
        uses.note(spec(name), digest=name, layers_matched=1)
    assert [use.key for use in uses.uses()] == ["a@r1/f", "c@r1/f"]
