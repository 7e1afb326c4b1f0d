"""What bases do, where adapters are resident and how much both are used: what replicas report and lists show.

Must not know how they are collected or sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from serve_app.core import AdapterSpec, Scale
from serve_app.families.abilities import BaseAbilities

# From the fastest to the slowest tier; an applied adapter is in the tiers below too.
HeldIn = Literal["applied", "device", "host"]
FASTEST_FIRST: tuple[HeldIn, ...] = ("applied", "device", "host")


@dataclass(frozen=True, slots=True)
class ResidentAdapter:
    """An adapter that a replica holds, and its fastest tier there; `key` names its bytes."""

    key: str
    id: str
    tier: HeldIn


@dataclass(frozen=True, slots=True)
class AdapterUsage:
    """The requests for an adapter at a replica since its start, and the last one in seconds since 1970.

    `layers_matched` is how many layers of the base its file changes.
    """

    key: str
    hits: int
    last_used_s: float
    layers_matched: int


@dataclass(frozen=True, slots=True)
class QuarantinedAdapters:
    """An adapter set that a replica refuses for now, with the reason and the seconds that are left."""

    keys: tuple[str, ...]
    scales: tuple[Scale, ...]
    reason: str
    left_s: int


@dataclass(frozen=True, slots=True)
class ActiveAdapter:
    """An adapter that is fused into the live weights, with its scale."""

    id: str
    scale: Scale


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """The state of one replica and its adapters; one that is still starting has none.

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
    quarantined: tuple[QuarantinedAdapters, ...] = ()
    abilities: BaseAbilities | None = None


@dataclass(frozen=True, slots=True)
class BaseState:
    """What a base does; `since_s` is in seconds since 1970, `expected_s` until a replica can draw, None if unknown.

    A base is "waiting" while no node has room for its replica, with `expected_s` from when one has, and "stopped" where
    the next request starts one. The `reason` says why it waits or has failed; `is_absent`, that it has failed since its
    application is not there.
    """

    state: Literal["running", "starting", "waiting", "failed", "stopped"]
    since_s: float | None = None
    expected_s: float | None = None
    reason: str | None = None
    is_absent: bool = False


# What was drawn is kept for so many days before the last one.
KEPT_USAGE_DAYS = 400


@dataclass(frozen=True, slots=True)
class DayUsage:
    """What was drawn on one day (UTC, "2026-11-30") with one key, None for no key, on one base."""

    day: str
    key: str | None
    base_id: str
    images: int
    device_s: float


@dataclass(frozen=True, slots=True)
class KnownAdapter:
    """An adapter that can be listed, the largest rank of its layers, and how its files present it.

    `has_picture` says that a picture comes with it; `example_prompt` is the first that its card shows.
    """

    spec: AdapterSpec
    rank: int
    has_picture: bool = False
    example_prompt: str | None = None


@dataclass(frozen=True, slots=True)
class LoraReport:
    """One row of the registry: an adapter or an alias, where it is resident, and its use.

    `resident` pairs replicas with tiers. `layers_matched` is None until some replica has read the file. `quarantined`
    has the replicas that refuse it for now, the longest first.
    """

    id: str
    adapter: KnownAdapter
    alias_of: str | None = None
    aliases: tuple[str, ...] = ()
    resident: tuple[tuple[str, HeldIn], ...] = ()
    hits: int = 0
    last_used_s: float | None = None
    layers_matched: int | None = None
    quarantined: tuple[tuple[str, QuarantinedAdapters], ...] = ()


@dataclass(frozen=True, slots=True)
class Preloaded:
    """The replicas that hold an adapter after a preload, and how many were requested."""

    spec: AdapterSpec
    replicas: tuple[str, ...]
    asked: int


@dataclass(frozen=True, slots=True)
class Removal:
    """The result of a removal: whether an alias was removed, and the replicas that held the adapter."""

    id: str
    was_alias: bool
    replicas: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model that a request may name: a base, or an adapter with its base.

    `created` is in seconds since 1970, 0 if unknown.
    """

    id: str
    base_id: str | None
    owned_by: str
    created: int
