"""What one router knows of the replicas: what they told, and what it has sent there since.

A request counts against a replica as soon as this router sends it there. It stops counting when a newer report of that
replica includes it. A replica is marked as suspect if its reports stop while other replicas still report, or if its
device makes no progress. Must not know Ray; time is passed in, in Unix seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

from serve_app.routing.cost import NO_KEYS, Location, ReplicaView, RequestLoad, RequiredAdapter, TierCosts, location_of
from serve_app.routing.disk import DiskCacheEstimate
from serve_app.routing.stats import ReplicaStats, decode, tag_of
from serve_app.work import LatencyModel

# A replica that tells its state counts a request at the latest so long after it was accepted there.
REPORT_LAG_S = 0.05
# A choice that did not lead to an acceptance so soon did not lead to one.
RESERVATION_TTL_S = 2.0
# A replica's backlog is worked off while no news of it comes, but no further than this: it may have stopped.
MAX_DECAY_S = 2.0
VIEW_TTL_S = 0.05
# What an adapter weighs that no request through this router has asked for.
TYPICAL_BYTES = 100_000_000
MAX_SIZES = 16_384
# Nodes whose disks are guessed; where nodes come and go, those that nothing came to for longest are forgotten.
MAX_DISKS = 256


@dataclass(frozen=True, slots=True)
class ReplicaSnapshot:
    """A replica as Serve presents it: what it told last, and the adapters that Serve's multiplexer says it holds."""

    id: str
    node_id: str
    told: Mapping[str, Any]
    held: Set[str] = NO_KEYS


@dataclass(frozen=True, slots=True)
class _InFlight:
    """A request sent and not finished; once `is_reported`, what the replica tells counts it."""

    demand: RequestLoad
    seconds: float
    at_s: float
    place: Location
    is_accepted: bool = False
    is_reported: bool = False


@dataclass(slots=True)
class _Known:
    sighting: ReplicaSnapshot
    first_seen_s: float
    stats: ReplicaStats | None = None
    bookings: dict[str, _InFlight] = field(default_factory=dict[str, _InFlight])
    view: ReplicaView | None = None
    viewed_s: float = 0.0
    # Of what it told last, the work that has ended since.
    ended_s: float = 0.0


class ReplicaStateCache:
    """One router's books. Not thread-safe."""

    def __init__(
        self,
        *,
        disk_bytes: int,
        stale_after_s: float = 15.0,
        costs: TierCosts | None = None,
        pace: LatencyModel | None = None,
    ) -> None:
        """Start with no replica known.

        Args:
            disk_bytes: What a node keeps of adapters on its disk, 0 where it keeps none.
            stale_after_s: How far a replica's news may be behind that of the others.
            costs: What steps cost before replicas have measured them.
            pace: How fast a replica works before any has told.
        """
        self._disk_bytes = disk_bytes
        self._stale_after_s = stale_after_s
        self._default_costs = costs or TierCosts()
        self._default_pace = pace or LatencyModel(fixed_s=0.5, unit_s=0.1)
        self.costs = self._default_costs
        self._known: dict[str, _Known] = {}
        self._booked_at: dict[str, str] = {}
        self._disks: dict[str, DiskCacheEstimate] = {}
        self._sizes: dict[str, int] = {}
        self._newest_s = float("-inf")
        self._has_news = False

    def with_short_keys(self, demand: RequestLoad) -> RequestLoad:
        """Return the demand with the names under which adapters are known here, and remember their sizes."""
        if len(self._sizes) > MAX_SIZES:
            self._sizes.clear()
        needs = tuple(RequiredAdapter(tag_of(need.key), need.size_bytes) for need in demand.adapters)
        for need in needs:
            self._sizes[need.key] = need.size_bytes
        return RequestLoad(needs, demand.units)

    def update_snapshot(self, sighting: ReplicaSnapshot, now_s: float) -> None:
        """Take in a replica that is new or has news."""
        known = self._known.get(sighting.id)
        if known is None:
            known = self._known[sighting.id] = _Known(sighting, first_seen_s=now_s)
        else:
            known.sighting = sighting
            known.view = known.view if known.stats is not None else None
        stats = decode(sighting.told)
        if stats is None or (known.stats is not None and known.stats.at_s == stats.at_s):
            return
        self._remember_disk(sighting.node_id, stats.host - (known.stats.host if known.stats else NO_KEYS))
        known.stats, known.view, known.ended_s = stats, None, 0.0
        self._has_news = True

    def retain(self, ids: Set[str]) -> None:
        """Forget every replica that is not among these."""
        for id_ in [id_ for id_ in self._known if id_ not in ids]:
            for request_id in self._known.pop(id_).bookings:
                del self._booked_at[request_id]

    def has_seen(self, id_: str, told: Mapping[str, Any]) -> bool:
        """Tell whether this very news of a replica has been taken in."""
        known = self._known.get(id_)
        return known is not None and known.sighting.told is told

    def count(self) -> int:
        """How many replicas are known."""
        return len(self._known)

    def refresh_views(self, now_s: float) -> list[ReplicaView]:
        """Return what is known of every replica at this moment."""
        if self._has_news:
            self._update_from_reports()
        return [self._view(known, now_s) for known in self._known.values()]

    def add_in_flight(self, id_: str, request_id: str, demand: RequestLoad, now_s: float) -> None:
        """Count a request as sent to a replica, and no longer as sent to any other; `demand` is a tagged one."""
        self._remove_in_flight(request_id)
        known = self._known.get(id_)
        if known is None or demand.units <= 0:
            return
        view = self._view(known, now_s)
        known.bookings[request_id] = _InFlight(
            demand, view.pace.seconds(demand.units), now_s, location_of(demand, view)
        )
        self._booked_at[request_id] = id_
        known.view = None

    def accepted(self, id_: str, request_id: str, now_s: float) -> Location | None:
        """Note that a replica has taken the request; return where its adapters were said to be, None if unknown."""
        known = self._known.get(id_)
        booking = known.bookings.get(request_id) if known else None
        if known is None or booking is None:
            return None
        known.bookings[request_id] = replace(booking, at_s=now_s, is_accepted=True)
        return booking.place

    def finished(self, id_: str, request_id: str) -> None:
        """Count a request no more: it ended, or the replica refused it. One that is elsewhere by now stays there."""
        if self._booked_at.get(request_id) == id_:
            booking = self._remove_in_flight(request_id)
            if booking is not None and booking.is_reported:
                self._known[id_].ended_s += booking.seconds

    def _remove_in_flight(self, request_id: str) -> _InFlight | None:
        known = self._known.get(self._booked_at.pop(request_id, ""))
        if known is None:
            return None
        known.view = None
        return known.bookings.pop(request_id, None)

    def _remember_disk(self, node_id: str, new: Set[str]) -> None:
        """An adapter comes to host memory through the node's disk, and stays on it when it leaves memory."""
        if not self._disk_bytes:
            return
        disk = self._disks[node_id] = self._disks.pop(node_id, None) or DiskCacheEstimate(self._disk_bytes)
        if len(self._disks) > MAX_DISKS:
            del self._disks[next(iter(self._disks))]
        for tag in new:
            disk.put(tag, self._sizes.get(tag, TYPICAL_BYTES))

    def _update_from_reports(self) -> None:
        """Draw what follows from the news of all replicas together."""
        self._has_news = False
        told = [known.stats for known in self._known.values() if known.stats is not None]
        if not told:
            return
        self._newest_s = max(stats.at_s for stats in told)
        self.costs = self._default_costs.measured(
            swap=_middle([stats.measured.swap for stats in told]),
            to_host=_middle([stats.measured.to_host for stats in told]),
            fetch=_middle([stats.measured.fetch for stats in told]),
        )
        self._default_pace = told[0].pace

    def _view(self, known: _Known, now_s: float) -> ReplicaView:
        view, stats = known.view, known.stats
        heard_s = known.first_seen_s if stats is None else stats.at_s
        is_suspect = heard_s < self._newest_s - self._stale_after_s or (stats is not None and stats.is_stalled)
        if view is not None and view.is_suspect == is_suspect:
            is_steady = not known.bookings and (stats is None or not stats.backlog_s)
            if is_steady or now_s - known.viewed_s < VIEW_TTL_S:
                return view
        known.view = view = self._make_view(known, now_s, is_suspect=is_suspect)
        known.viewed_s = now_s
        return view

    def _make_view(self, known: _Known, now_s: float, *, is_suspect: bool) -> ReplicaView:
        stats, untold = known.stats, self._expire_and_list_unreported(known, now_s) if known.bookings else []
        backlog_s, applied, arriving = 0.0, NO_KEYS, NO_KEYS
        if stats is not None:
            done_s = max(min(now_s - stats.at_s, MAX_DECAY_S), known.ended_s, 0.0)
            backlog_s = max(stats.backlog_s - done_s, 0.0)
            applied, arriving = stats.applied, stats.arriving
        if untold:
            backlog_s += sum(booking.seconds for booking in untold)
            arriving = arriving.union(need.key for booking in untold for need in booking.demand.adapters)
            applied = untold[-1].demand.keys
        return ReplicaView(
            id=known.sighting.id,
            backlog_s=backlog_s,
            pace=self._default_pace if stats is None else stats.pace,
            applied=applied,
            device=NO_KEYS if stats is None else stats.device,
            host=frozenset(map(tag_of, known.sighting.held)) if stats is None else stats.host,
            disk=self._disks.get(known.sighting.node_id, NO_KEYS),
            arriving=arriving,
            host_free_bytes=float("inf") if stats is None else stats.host_free_bytes,
            evicts_to_disk=self._disk_bytes > 0,
            is_suspect=is_suspect,
        )

    def _expire_and_list_unreported(self, known: _Known, now_s: float) -> list[_InFlight]:
        """Return what a replica was sent and has not told of, oldest first; drop what never came to it."""
        told_s = known.stats.at_s if known.stats is not None else float("-inf")
        untold: list[_InFlight] = []
        for request_id, booking in list(known.bookings.items()):
            if booking.is_reported:
                continue
            if booking.is_accepted and told_s > booking.at_s + REPORT_LAG_S:
                known.bookings[request_id] = replace(booking, is_reported=True)
            elif not booking.is_accepted and now_s > booking.at_s + RESERVATION_TTL_S:
                del known.bookings[request_id], self._booked_at[request_id]
            else:
                untold.append(booking)
        return untold


def _middle(factors: list[float]) -> float:
    """Return the median of what was measured; a factor of exactly 1 is one that nobody measured."""
    measured = [factor for factor in factors if factor != 1.0]
    return median(measured) if measured else 1.0
