"""Who holds which adapter, and how often each was used: what replicas tell and lists show.

Owns the values alone. Must not know how they are gathered or written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from serve_app.core import AdapterSpec, Scale
from serve_app.families.abilities import BaseAbilities

# From the fastest to the slowest place; whoever is in the weights is in the tiers below too.
HeldIn = Literal["applied", "device", "host"]
FASTEST_FIRST: tuple[HeldIn, ...] = ("applied", "device", "host")


@dataclass(frozen=True, slots=True)
class ResidentAdapter:
    """An adapter that a replica holds, and the fastest of the tiers it is on; `key` names the very bytes."""

    key: str
    id: str
    tier: HeldIn


@dataclass(frozen=True, slots=True)
class AdapterUsage:
    """How often a replica was asked for an adapter since it started, and when last, in seconds since 1970.

    `layers_matched` is how many layers of the base its file changes.
    """

    key: str
    hits: int
    last_used_s: float
    layers_matched: int


@dataclass(frozen=True, slots=True)
class QuarantinedAdapters:
    """Adapters that a replica refuses for now, together and at these scales, why, and for how long."""

    keys: tuple[str, ...]
    scales: tuple[Scale, ...]
    reason: str
    left_s: int


@dataclass(frozen=True, slots=True)
class ActiveAdapter:
    """An adapter that is in the live weights, at a scale."""

    id: str
    scale: Scale


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """What one replica is doing and holds; one that is not running yet holds nothing.

    `backlog_s` is the predicted time of all the work that it has accepted and not finished.
    """

    id: str
    base_id: str
    state: Literal["RUNNING", "STARTING", "SILENT"] = "RUNNING"
    device: str | None = None
    waiting: int = 0
    running: int = 0
    backlog_s: float = 0.0
    applied: tuple[ActiveAdapter, ...] = ()
    holdings: tuple[ResidentAdapter, ...] = ()
    uses: tuple[AdapterUsage, ...] = ()
    held_back: tuple[QuarantinedAdapters, ...] = ()
    abilities: BaseAbilities | None = None


@dataclass(frozen=True, slots=True)
class KnownAdapter:
    """An adapter that can be listed, and the largest rank of its layers."""

    spec: AdapterSpec
    rank: int


@dataclass(frozen=True, slots=True)
class LoraReport:
    """One row of the registry: an adapter or an alias of one, where it is resident, and how much it is used.

    `resident` pairs replicas with tiers. `layers_matched` is None until some replica has read the file. `held_back` is
    what replicas refuse of it for now, each with the replica, the longest first.
    """

    id: str
    adapter: KnownAdapter
    alias_of: str | None = None
    aliases: tuple[str, ...] = ()
    resident: tuple[tuple[str, HeldIn], ...] = ()
    hits: int = 0
    last_used_s: float | None = None
    layers_matched: int | None = None
    held_back: tuple[tuple[str, QuarantinedAdapters], ...] = ()


@dataclass(frozen=True, slots=True)
class Preloaded:
    """Which replicas hold an adapter after a preload, and how many were asked for."""

    spec: AdapterSpec
    replicas: tuple[str, ...]
    asked: int


@dataclass(frozen=True, slots=True)
class Removal:
    """What a removal did: whether a name is gone, and the replicas that were told to forget the adapter."""

    id: str
    was_alias: bool
    replicas: tuple[str, ...]
