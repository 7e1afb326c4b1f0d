from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.core import AdapterSpec, Timings
from serve_app.routing.cost import TierCosts
from serve_app.routing.recorder import MAX_FACTOR, DeviceLoad, RoutingStatsCollector, Tiers
from serve_app.routing.stats import HEARTBEAT_S, MAX_REPORTED, ReplicaStats, decode, tag_of
from serve_app.work import LatencyModel
from tests.routing_cases import KEYS, MEGABYTE, adapter, demand

IDLE = DeviceLoad(0.0, LatencyModel(0.5, 0.1), progress=0.0, is_busy=False)
EMPTY = Tiers((), host_free_bytes=1e9)


@dataclass
class Clocks:
    """Both clocks of a recorder, moved by hand."""

    now_s: float = 1_000_000.0
    recorder: RoutingStatsCollector = field(init=False)

    def __post_init__(self) -> None:
        self.recorder = RoutingStatsCollector(
            wall_clock=lambda: self.now_s, clock=lambda: self.now_s, stall_after_s=60.0
        )

    def snapshot(self, load: DeviceLoad = IDLE, tiers: Tiers = EMPTY) -> ReplicaStats:
        stats = decode(self.recorder.snapshot(load, tiers))
        assert stats is not None
        return stats


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


@dataclass(frozen=True)
class Lease:
    spec: AdapterSpec
    tier: str
    fetch_ms: float


def lease(tier: str, fetch_ms: float, size_bytes: int = 100 * MEGABYTE) -> Lease:
    return Lease(AdapterSpec("acme/a", "demo/sd15", "1", "a", "folder", "", size_bytes), tier, fetch_ms)


def test_a_replica_at_rest_has_no_news_between_two_beats(clocks: Clocks) -> None:
    first = clocks.recorder.snapshot(IDLE, EMPTY)
    clocks.now_s += 0.9 * (HEARTBEAT_S - clocks.now_s % HEARTBEAT_S)
    assert clocks.recorder.snapshot(IDLE, EMPTY) is first
    clocks.now_s += HEARTBEAT_S
    assert clocks.recorder.snapshot(IDLE, EMPTY)["at"] == clocks.now_s


def test_what_moves_by_less_than_the_grain_is_no_news(clocks: Clocks) -> None:
    def told(backlog_s: float, unit_s: float) -> dict[str, Any]:
        return clocks.recorder.snapshot(DeviceLoad(backlog_s, LatencyModel(0.5, unit_s), 0.0, is_busy=True), EMPTY)

    assert told(7.01, 0.1001) is told(6.99, 0.0999)
    assert told(7.01, 0.1) is not told(7.2, 0.1)


def test_what_is_told_is_small(clocks: Clocks) -> None:
    keys = [f"acme/some-adapter-{number}@0123456789abcdef/pytorch_lora_weights.safetensors" for number in range(64)]
    assert len(pickle.dumps(clocks.recorder.snapshot(IDLE, Tiers(keys, 0.0)))) < 1000
    many = [f"{key}{index}" for key in keys for index in range(100)]
    assert len(pickle.dumps(clocks.recorder.snapshot(IDLE, Tiers(many, 0.0)))) < 10 * MAX_REPORTED


def test_the_last_used_adapters_are_told_where_there_are_too_many(clocks: Clocks) -> None:
    keys = [f"k{number}" for number in range(2 * MAX_REPORTED)]
    assert clocks.snapshot(tiers=Tiers(keys, 0.0)).host == {tag_of(key) for key in keys[-MAX_REPORTED:]}


def test_adapters_on_their_way_are_told_until_they_are_there(clocks: Clocks) -> None:
    with clocks.recorder.fetching(demand("a", "b")):
        here = Tiers([adapter("b").key], 0.0)
        assert clocks.snapshot(tiers=here).arriving == {tag_of(adapter("a").key)}
        with clocks.recorder.fetching(demand("a")):
            pass
        assert clocks.snapshot().arriving == {tag_of(adapter(name).key) for name in "ab"}
    assert clocks.snapshot().arriving == frozenset()


def test_a_fetch_that_fails_leaves_nothing_on_its_way(clocks: Clocks) -> None:
    with pytest.raises(OSError, match="gone"), clocks.recorder.fetching(demand("a")):
        raise OSError("gone")
    assert clocks.snapshot().arriving == frozenset()


def test_the_last_queued_composition_is_what_will_be_applied(clocks: Clocks) -> None:
    clocks.recorder.queued(demand("a"))
    clocks.recorder.queued(demand("b", "c"))
    assert clocks.snapshot().applied == {tag_of(adapter(name).key) for name in "bc"}
    clocks.recorder.queued(demand())
    assert clocks.snapshot().applied == frozenset()


def test_a_busy_device_without_headway_is_stalled_until_it_moves(clocks: Clocks) -> None:
    busy = DeviceLoad(5.0, LatencyModel(0.5, 0.1), progress=7.0, is_busy=True)
    clocks.snapshot(busy)
    clocks.now_s += 59
    assert not clocks.snapshot(busy).is_stalled
    clocks.now_s += 2
    assert clocks.snapshot(busy).is_stalled
    assert not clocks.snapshot(DeviceLoad(5.0, LatencyModel(0.5, 0.1), progress=8.0, is_busy=True)).is_stalled


def test_a_device_at_rest_is_never_stalled(clocks: Clocks) -> None:
    clocks.snapshot()
    clocks.now_s += 10_000
    assert not clocks.snapshot().is_stalled


def test_measured_fetches_and_swaps_are_told_in_relation_to_the_defaults(clocks: Clocks) -> None:
    expected = TierCosts()
    size_bytes = 100 * MEGABYTE
    clocks.recorder.served(
        [
            lease("remote", 2e3 * expected.fetch.seconds(size_bytes)),
            lease("disk", 3e3 * expected.to_host.seconds(size_bytes)),
        ],
        Timings(swap_ms=4e3 * expected.swap.seconds(2 * size_bytes)),
    )
    measured = clocks.snapshot().measured
    assert (measured.fetch, measured.to_host, measured.swap) == pytest.approx((2.0, 3.0, 4.0))


def test_what_was_in_memory_or_in_the_weights_already_teaches_nothing(clocks: Clocks) -> None:
    clocks.recorder.served([lease("host", 0.01)], Timings(swap_ms=0.01))
    clocks.recorder.served([], Timings(swap_ms=20.0))
    measured = clocks.snapshot().measured
    assert (measured.fetch, measured.to_host, measured.swap) == (1.0, 1.0, 1.0)


@given(st.lists(st.floats(0, 1e9), min_size=1, max_size=20))
def test_no_measurement_makes_a_cost_absurd(fetches_ms: list[float]) -> None:
    clocks = Clocks()
    for fetch_ms in fetches_ms:
        clocks.recorder.served([lease("remote", fetch_ms)], Timings())
    assert 1 / MAX_FACTOR * 0.9 <= clocks.snapshot().measured.fetch <= MAX_FACTOR


@given(st.frozensets(st.sampled_from(KEYS)), st.floats(0, 1e5), st.floats(0, 1e12), st.booleans())
def test_what_is_told_is_what_was_meant(keys: frozenset[str], backlog_s: float, free: float, is_busy: bool) -> None:
    clocks = Clocks()
    stats = clocks.snapshot(
        DeviceLoad(backlog_s, LatencyModel(0.5, 0.125), 0.0, is_busy=is_busy), Tiers(sorted(keys), free)
    )
    assert stats.host == {tag_of(key) for key in keys}
    assert stats.backlog_s == pytest.approx(backlog_s, rel=0.06, abs=0.051)
    assert stats.host_free_bytes == pytest.approx(free, rel=0.06)
    assert stats.pace == LatencyModel(0.5, 0.12)
