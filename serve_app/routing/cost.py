"""Which replica a request should go to: the one that is predicted to finish it first, at the least cost to others.

Owns what a replica is predicted to need for a request, and the order that follows from it. Must not know Ray, torch,
the time, or how what it is told was learned.
"""

from __future__ import annotations

from collections.abc import Container, Sequence, Set
from dataclasses import dataclass, replace
from random import Random
from typing import Literal, get_args

from serve_app.core import GenerationRequest
from serve_app.work import LatencyModel, work_units

NO_KEYS: frozenset[str] = frozenset()

# Where a request's adapters are, by the one that is farthest; "base" for a request without any.
Location = Literal["base", "applied", "device", "host", "disk", "arriving", "remote"]
PLACES: tuple[Location, ...] = get_args(Location)


@dataclass(frozen=True, slots=True)
class RequiredAdapter:
    """An adapter that a request needs: its key, and the size of its file."""

    key: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class RequestLoad:
    """What a request asks of whoever runs it: its adapters, none for the base alone, and its work in units."""

    adapters: tuple[RequiredAdapter, ...]
    units: float

    @property
    def keys(self) -> frozenset[str]:
        """The keys of its adapters."""
        return frozenset(need.key for need in self.adapters)


@dataclass(slots=True)  # never changed, but not frozen: a hundred are made for a decision, at twice the price
class ReplicaView:
    """What is known of a replica when a request is to be placed.

    `backlog_s` is the predicted time of everything accepted there and not finished, whether running, queued or
    waiting for its adapters. `applied` is what will be in the weights once that is done, empty for the base alone.
    `device`, `host` and `disk` hold the keys known to be on a tier; a key may be on several, and one that is on none
    is fetched from its source. `arriving` holds the keys that others there have asked for and that are not there yet.
    `host_free_bytes` is what the host tier takes before it evicts, and `evicts_to_disk` whether what it evicts comes
    back from the node's disk; otherwise it is fetched again. `is_suspect` says that it seems to hang.
    """

    id: str
    backlog_s: float
    pace: LatencyModel
    applied: Set[str] = NO_KEYS
    device: Container[str] = NO_KEYS
    host: Container[str] = NO_KEYS
    disk: Container[str] = NO_KEYS
    arriving: Container[str] = NO_KEYS
    host_free_bytes: float = float("inf")
    evicts_to_disk: bool = True
    is_suspect: bool = False


@dataclass(frozen=True, slots=True)
class LinearCost:
    """How long one step on an adapter's way takes: a fixed time, and a time for its bytes."""

    fixed_s: float
    byte_s: float

    def seconds(self, size_bytes: int) -> float:
        """Return the predicted time for a file of this size."""
        return self.fixed_s + self.byte_s * size_bytes

    def times(self, factor: float) -> LinearCost:
        """Return the step as it is where everything takes `factor` times as long."""
        return LinearCost(self.fixed_s * factor, self.byte_s * factor)


@dataclass(frozen=True, slots=True)
class TierCosts:
    """What the steps between the tiers take, and how much of the cost to others counts.

    `swap` changes the weights once, whatever is applied then; `to_device`, `to_host` and `fetch` bring an adapter
    from host memory, from the node's disk, and from its source through admission. The defaults are those of an
    adapter of SDXL's size on a node with a GPU; a replica's own measurements replace them.

    The burden of a placement is what it costs others there: `fetch_share` is the part of a fetch that counts though it
    hides behind the waiting, since it takes the way to the source from others; `evict_share` is the chance that what
    is evicted is asked for again.
    """

    swap: LinearCost = LinearCost(0.03, 0.0)
    to_device: LinearCost = LinearCost(0.001, 1 / 12e9)
    to_host: LinearCost = LinearCost(0.01, 1 / 3e9)
    fetch: LinearCost = LinearCost(0.5, 1 / 100e6)
    fetch_share: float = 0.25
    evict_share: float = 0.25

    def measured(self, *, swap: float = 1.0, to_host: float = 1.0, fetch: float = 1.0) -> TierCosts:
        """Return the costs where each step was measured to take so many times what is said here."""
        return replace(
            self, swap=self.swap.times(swap), to_host=self.to_host.times(to_host), fetch=self.fetch.times(fetch)
        )


@dataclass(frozen=True, slots=True)
class Prediction:
    """How a request would fare on a replica, in seconds from now.

    It waits `wait_s` for the device or for its adapters, whichever takes longer, then `swap_s` and `work_s` on the
    device. `displacement_cost_s` is what that costs others.
    """

    wait_s: float
    swap_s: float
    work_s: float
    displacement_cost_s: float

    @property
    def finish_s(self) -> float:
        """When it is done."""
        return self.wait_s + self.swap_s + self.work_s

    @property
    def cost_s(self) -> float:
        """What ranks it: when it is done, and what that costs others."""
        return self.finish_s + self.displacement_cost_s


def demand_of(request: GenerationRequest) -> RequestLoad:
    """Return what a request asks for."""
    needs = tuple(RequiredAdapter(use.spec.key, use.spec.size_bytes) for use in request.adapters)
    return RequestLoad(needs, work_units(request))


def predict(demand: RequestLoad, view: ReplicaView, costs: TierCosts) -> Prediction:
    """Predict how a request would fare on a replica.

    Its adapters are fetched together and while it waits for the device. Where they are in the weights when its turn
    comes, there is no swap; a request for the base alone swaps where an adapter is.
    """
    fetch_s, swap_s, displacement_cost_s = _bringing(_price(demand, costs), view, costs)
    return Prediction(max(view.backlog_s, fetch_s), swap_s, view.pace.seconds(demand.units), displacement_cost_s)


def finish_s(demand: RequestLoad, view: ReplicaView, costs: TierCosts) -> float:
    """Return when the request would be done on a replica, in seconds from now."""
    return predict(demand, view, costs).finish_s


def cost_s(demand: RequestLoad, view: ReplicaView, costs: TierCosts) -> float:
    """Return what ranks a replica: `finish_s`, and what the placement costs others."""
    return predict(demand, view, costs).cost_s


def location_of(demand: RequestLoad, view: ReplicaView) -> Location:
    """Return where the farthest of the request's adapters is."""
    places: list[Location] = ["base"]
    for need in demand.adapters:
        key = need.key
        if key in view.applied:
            places.append("applied")
        elif key in view.device:
            places.append("device")
        elif key in view.host:
            places.append("host")
        elif key in view.arriving:
            places.append("arriving")
        else:
            places.append("disk" if key in view.disk else "remote")
    return max(places, key=PLACES.index)


def rank(
    demand: RequestLoad, refresh_views: Sequence[ReplicaView], costs: TierCosts, *, rng: Random, tie_s: float = 0.01
) -> list[list[str]]:
    """Return the ids of all replicas, best first: those of one rank cost the same to within `tie_s`, in random order.

    The first is never predicted to finish later than any other one would with the burden of that one's placement, so
    that nobody waits for a warm replica longer than a cold one costs. A replica that seems to hang comes after all
    others.
    """
    price, units = _price(demand, costs), demand.units
    costed: list[tuple[bool, float, str]] = []
    for view in refresh_views:  # without `predict`: this runs for every replica at every request
        fetch_s, swap_s, displacement_cost_s = _bringing(price, view, costs)
        backlog_s, pace = view.backlog_s, view.pace
        wait_s = backlog_s if backlog_s > fetch_s else fetch_s
        work_s = pace.fixed_s + pace.unit_s * units
        costed.append((view.is_suspect, wait_s + swap_s + work_s + displacement_cost_s, view.id))
    costed.sort()
    ranks: list[list[str]] = []
    best_suspect, best_cost = False, float("-inf")
    for is_suspect, cost, id_ in costed:
        if not ranks or is_suspect != best_suspect or cost > best_cost + tie_s:
            best_suspect, best_cost = is_suspect, cost
            ranks.append([])
        ranks[-1].append(id_)
    for members in ranks:
        if len(members) > 1:
            rng.shuffle(members)
    return ranks


@dataclass(frozen=True, slots=True)
class _Price:
    """A demand with what each step takes for it: a key, its bytes, and the seconds to device, to host and to fetch."""

    needs: tuple[tuple[str, int, float, float, float], ...]
    swap_s: float


def _price(demand: RequestLoad, costs: TierCosts) -> _Price:
    needs = tuple(
        (
            need.key,
            need.size_bytes,
            costs.to_device.seconds(need.size_bytes),
            costs.to_host.seconds(need.size_bytes),
            costs.fetch.seconds(need.size_bytes),
        )
        for need in demand.adapters
    )
    return _Price(needs, costs.swap.seconds(sum(need.size_bytes for need in demand.adapters)))


def _bringing(price: _Price, view: ReplicaView, costs: TierCosts) -> tuple[float, float, float]:
    """Return the seconds until the adapters are in host memory, those of the swap, and the burden."""
    fetch_s = swap_s = 0.0
    new_bytes = 0
    applied = view.applied
    is_applied = len(price.needs) == len(applied)
    for key, size_bytes, to_device_s, to_host_s, from_source_s in price.needs:
        if key in applied:
            continue
        is_applied = False
        if key in view.device:
            continue
        swap_s += to_device_s
        if key in view.host:
            continue
        step_s = to_host_s if key in view.disk else from_source_s
        if key in view.arriving:
            # It left some time ago: half of the way is the best guess.
            step_s /= 2
        else:
            new_bytes += size_bytes
        fetch_s = max(fetch_s, step_s)
    if not is_applied:
        swap_s += price.swap_s
    return fetch_s, swap_s, _burden_s(view, costs, new_bytes, fetch_s) if new_bytes else 0.0


def _burden_s(view: ReplicaView, costs: TierCosts, new_bytes: int, fetch_s: float) -> float:
    hidden_s = min(view.backlog_s, fetch_s) * costs.fetch_share
    evicted_bytes = new_bytes - view.host_free_bytes
    if evicted_bytes <= 0:
        return hidden_s
    step = costs.to_host if view.evicts_to_disk else costs.fetch
    return hidden_s + costs.evict_share * step.seconds(int(evicted_bytes))
