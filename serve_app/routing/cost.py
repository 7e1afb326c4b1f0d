"""Which replica a request should go to: the one with the least work ahead, unless another needs no fetch or swap.

Owns the ranking. Must not know Ray, torch, the time, or how what it knows was learned; the simulator runs it too.
"""

from __future__ import annotations

import functools
import hashlib
from base64 import urlsafe_b64encode
from collections.abc import Container, Iterable, Set
from dataclasses import dataclass
from random import Random

from serve_app.core import GenerationRequest
from serve_app.work import LatencyModel, work_units

# The cost of a missing adapter, as seconds of work: about its time from source to memory. No request
# waits longer than that for a replica that holds it.
FETCH_S = 0.5
FETCH_BYTE_S = 1 / 100e6
# The cost of a swap, which decides between replicas that are otherwise alike.
SWAP_S = 0.03
# Costs that differ by less are a tie.
TIE_S = 0.01
# A replica with so much work ahead makes no progress, and comes after all others.
STALLED_S = 1e6


@functools.lru_cache(maxsize=65_536)
def tag_of(text: str) -> str:
    """Return the eight characters under which a request or a composition travels."""
    return urlsafe_b64encode(hashlib.blake2b(text.encode(), digest_size=6).digest()).decode()


# The composition of a request without adapters.
BASE_ALONE = tag_of("")


@dataclass(frozen=True, slots=True)
class RequiredAdapter:
    """An adapter that a request needs: its key, and the size of its file."""

    key: str
    size_bytes: int

    @property
    def fetch_s(self) -> float:
        """The seconds it counts where it is missing."""
        return FETCH_S + self.size_bytes * FETCH_BYTE_S


@dataclass(frozen=True, slots=True)
class RequestLoad:
    """The demand of a request: its adapters, none for the base alone, its work in units, and the tag of the
    adapters and scales that must be in the weights."""

    adapters: tuple[RequiredAdapter, ...]
    units: float
    composition: str = BASE_ALONE

    @property
    def keys(self) -> frozenset[str]:
        """The keys of its adapters."""
        return frozenset(need.key for need in self.adapters)


@dataclass(slots=True)  # never changed, but not frozen: a hundred are made for a decision, at twice the price
class ReplicaView:
    """The state of a replica when a request is to be placed.

    `ahead_s` is the predicted time of all that was sent there and is not finished. `held` has the keys of the adapters
    in its memory or on their way there, in one or several sets; `fused` the compositions in its weights now or once
    its work is done.
    """

    id: str
    ahead_s: float
    pace: LatencyModel
    held: tuple[Container[str], ...] = ()
    fused: Set[str] = frozenset((BASE_ALONE,))

    def holds(self, key: str) -> bool:
        """Whether an adapter is in its memory, or on the way there."""
        return any(key in held for held in self.held)


def composition_of(request: GenerationRequest) -> str:
    """Return the tag of the adapters and scales that a request needs in the weights."""
    return tag_of("|".join(sorted(f"{use.spec.key}*{use.scale}" for use in request.adapters)))


def load_of(request: GenerationRequest) -> RequestLoad:
    """Return what a request asks for."""
    needs = tuple(RequiredAdapter(use.spec.key, use.spec.size_bytes) for use in request.adapters)
    return RequestLoad(needs, work_units(request), composition_of(request))


def cost_s(load: RequestLoad, view: ReplicaView) -> float:
    """Return what ranks a replica for a request: the work ahead and its own, its missing adapters, and a swap."""
    return waits_s(load, view) + view.pace.seconds(load.units)


def waits_s(load: RequestLoad, view: ReplicaView) -> float:
    """Return what a request waits for on a replica: the work ahead, its missing adapters, and a swap."""
    cost = view.ahead_s
    if load.composition not in view.fused:
        cost += SWAP_S
        for need in load.adapters:
            if not view.holds(need.key):
                cost += need.fetch_s
    return cost


def rank(load: RequestLoad, views: Iterable[ReplicaView], *, rng: Random) -> list[str]:
    """Return the ids of replicas, best first; ties are in random order."""
    costed = [(round(cost_s(load, view) / TIE_S), rng.random(), view.id) for view in views]
    return [id_ for _, _, id_ in sorted(costed)]


def tier_of(load: RequestLoad, view: ReplicaView) -> str:
    """Return where a request's adapters are on a replica: the values of the metric's label."""
    if not load.adapters:
        return "base"
    if load.composition in view.fused:
        return "applied"
    return "host" if all(map(view.holds, load.keys)) else "remote"
