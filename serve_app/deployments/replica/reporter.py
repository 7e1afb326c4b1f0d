"""The adapters of one replica and how often each was requested: the replica's side of the registry.

Owns the log of use, bounded, the turn from digests, by which the device knows adapters, to ids, and forgetting. Must
not know Ray, torch or the other replicas.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING

from serve_app.catalog.replica_report import (
    ActiveAdapter,
    AdapterUsage,
    HeldIn,
    QuarantinedAdapters,
    ReplicaReport,
    ResidentAdapter,
)
from serve_app.families.abilities import BaseAbilities
from serve_app.store.quarantine import QuarantineEntry
from serve_app.store.store import AdapterStore, Lease

if TYPE_CHECKING:
    from serve_app.engine.adapters.deltas import ParsedAdapter
    from serve_app.engine.weights.fused import FusedWeights
    from serve_app.engine.worker.state import WorkerState

MAX_REMEMBERED = 4096


@dataclass(slots=True)
class _Entry:
    id: str
    digest: str
    layers_matched: int
    hits: int = 0
    last_used_s: float = 0.0


class ReplicaReporter:
    """Reports of one replica on itself and its adapters; it knows those that were noted.

    The least recently used are forgotten beyond `max_remembered`.
    """

    def __init__(
        self,
        replica_id: str,
        base_id: str,
        device: str,
        *,
        abilities: BaseAbilities | None = None,
        store: AdapterStore[ParsedAdapter],
        weights: FusedWeights,
        clock: Callable[[], float],
        max_remembered: int = MAX_REMEMBERED,
    ) -> None:
        """Know nothing yet; `clock` is in seconds since 1970."""
        self.replica_id = replica_id
        self._base_id = base_id
        self._device = device
        self._abilities = abilities
        self._store = store
        self._weights = weights
        self._clock = clock
        self._max_remembered = max_remembered
        self._entries: OrderedDict[str, _Entry] = OrderedDict()

    def note(self, lease: Lease[ParsedAdapter], *, is_hit: bool) -> None:
        """Note that a request uses an adapter, or where it is no hit, that it was read."""
        key, adapter = lease.spec.key, lease.adapter
        entry = self._entries.setdefault(key, _Entry(lease.spec.id, "", adapter.coverage.layers_matched))
        entry.digest = adapter.digest
        if is_hit:
            entry.hits += 1
            entry.last_used_s = self._clock()
        self._entries.move_to_end(key)
        while len(self._entries) > self._max_remembered:
            self._entries.popitem(last=False)

    def report(self, state: WorkerState, holds: Sequence[QuarantineEntry] = ()) -> ReplicaReport:
        """Return what the replica does, as its worker says, holds, and refuses for now."""
        ids = {entry.digest: entry.id for entry in self._entries.values()}
        return ReplicaReport(
            id=self.replica_id,
            base_id=self._base_id,
            device=self._device,
            waiting=state.waiting,
            running=state.running,
            backlog_s=state.backlog_s,
            applied=tuple(ActiveAdapter(ids[digest], scale) for digest, scale in state.applied if digest in ids),
            holdings=self._holdings({digest for digest, _ in state.applied}),
            uses=tuple(
                AdapterUsage(key, entry.hits, entry.last_used_s, entry.layers_matched)
                for key, entry in self._entries.items()
            ),
            quarantined=tuple(QuarantinedAdapters(hold.keys, hold.scales, hold.reason, hold.left_s) for hold in holds),
            abilities=self._abilities,
        )

    def forget(self, model: str) -> bool:
        """Drop all revisions and files of an adapter from memory once unused; say whether one was there."""
        entries = {key: entry for key, entry in self._entries.items() if entry.id == model}
        was_held = any(map(self._store.is_resident, entries))
        for key, entry in entries.items():
            self._store.forget(key)
            self._weights.forget(entry.digest)
        return was_held

    def _holdings(self, applied: Set[str]) -> tuple[ResidentAdapter, ...]:
        """Return each adapter that is held, with its fastest tier: the device knows them by digest, the host by key."""
        device, host = set(self._weights.cached), set(self._store.resident())

        def tier_of(key: str, digest: str) -> HeldIn | None:
            if digest in applied:
                return "applied"
            return "device" if digest in device else "host" if key in host else None

        return tuple(
            ResidentAdapter(key, entry.id, tier)
            for key, entry in self._entries.items()
            if (tier := tier_of(key, entry.digest)) is not None
        )
