"""Replicas and demands to route with, drawn or made by hand."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from serve_app.routing.cost import ReplicaView, RequestLoad, RequiredAdapter, TierCosts
from serve_app.work import LatencyModel

MEGABYTE = 10**6
KEYS = tuple(f"acme/{name}@1/a.safetensors" for name in "abcdef")

seconds = st.floats(0, 300)
paces = st.builds(LatencyModel, fixed_s=st.floats(0, 2), unit_s=st.floats(0.001, 1))
tiers = st.frozensets(st.sampled_from(KEYS), max_size=4)
needs = st.builds(RequiredAdapter, st.sampled_from(KEYS), st.integers(1, 2000).map(lambda size: size * MEGABYTE))
demands = st.builds(
    RequestLoad,
    st.lists(needs, max_size=3, unique_by=lambda need: need.key).map(tuple),
    st.floats(0.1, 500),
)
refresh_views = st.builds(
    ReplicaView,
    id=st.just("r"),
    backlog_s=seconds,
    pace=paces,
    applied=tiers,
    device=tiers,
    host=tiers,
    disk=tiers,
    arriving=tiers,
    host_free_bytes=st.floats(0, 1e10),
    evicts_to_disk=st.booleans(),
)


@st.composite
def fleets(draw: st.DrawFn, least: int = 1) -> list[ReplicaView]:
    """Replicas of one base; like its real ones they work at one pace."""
    pace = draw(paces)
    drawn = draw(st.lists(refresh_views, min_size=least, max_size=6))
    return [replace(view, id=f"r{index}", pace=pace) for index, view in enumerate(drawn)]


COSTS = TierCosts()


def adapter(name: str = "a", size_bytes: int = 100 * MEGABYTE) -> RequiredAdapter:
    return RequiredAdapter(f"acme/{name}@1/a.safetensors", size_bytes)


def demand(*names: str, units: float = 60.0) -> RequestLoad:
    return RequestLoad(tuple(adapter(name) for name in names), units)


def keys(*names: str) -> frozenset[str]:
    return frozenset(adapter(name).key for name in names)


def view(id_: str, backlog_s: float = 0.0, **fields: object) -> ReplicaView:
    return ReplicaView(id_, backlog_s, LatencyModel(fixed_s=0.5, unit_s=0.1), **fields)  # type: ignore[arg-type]
