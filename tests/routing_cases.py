"""Replicas, reports and requests to route with, made by hand."""

from __future__ import annotations

from serve_app.core import AdapterSpec, GenerationRequest, ScaledAdapter
from serve_app.routing.cost import ReplicaView, RequestLoad, load_of
from serve_app.routing.stats import DeviceLoad
from serve_app.work import LatencyModel

BASE = "demo/sd15"
PACE = LatencyModel(fixed_s=0.5, unit_s=0.1)
# Where every adapter weighs this much, a fetch counts 1.5 s.
SIZE_BYTES = 10**8


def spec(name: str, size_bytes: int = SIZE_BYTES) -> AdapterSpec:
    return AdapterSpec(f"acme/{name}", BASE, "1" * 16, "a.safetensors", "folder", "", size_bytes)


def key(name: str) -> str:
    return spec(name).key


def generation(number: int, *adapters: str, scale: float = 1.0, size_bytes: int = SIZE_BYTES) -> GenerationRequest:
    uses = tuple(ScaledAdapter(spec(name, size_bytes), scale) for name in adapters)
    return GenerationRequest(f"r{number}", BASE, "a house", None, uses, 512, 512, 30, 7.5, None, number)


def load(*adapters: str, size_bytes: int = SIZE_BYTES) -> RequestLoad:
    return load_of(generation(0, *adapters, size_bytes=size_bytes))


def view(id_: str, ahead_s: float = 0.0, held: tuple[str, ...] = (), fused: tuple[str, ...] = ()) -> ReplicaView:
    """A replica that holds these adapters and has the composition of `fused` in its weights."""
    return ReplicaView(id_, ahead_s, PACE, (frozenset(map(key, held)),), frozenset((load(*fused).composition,)))


def device(backlog_s: float = 0.0, progress: float = 0.0, *, is_busy: bool = False) -> DeviceLoad:
    return DeviceLoad(backlog_s, PACE, progress, is_busy)
