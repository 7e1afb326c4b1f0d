"""What one replica holds and how often each adapter was asked for: the replica's side of the registry.

Owns the log of use, bounded, the turn from digests, by which the device knows adapters, to ids, and forgetting. Must
not know Ray, torch or the other replicas.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from serve_app.catalog.replica_report import (
    ActiveAdapter,
    AdapterUsage,
    QuarantinedAdapters,
    ReplicaReport,
    ResidentAdapter,
)
from serve_app.core import AdapterSpec, Scale
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


class AdapterUsageLog:
    """Adapters by key: their id, the digest of their file, and how often they were used.

    The least recently used are forgotten beyond `max_remembered`.
    """

    def __init__(self, *, clock: Callable[[], float], max_remembered: int = MAX_REMEMBERED) -> None:
        """Begin with nothing; `clock` is in seconds since 1970."""
        self._clock = clock
        self._max_remembered = max_remembered
        self._entries: OrderedDict[str, _Entry] = OrderedDict()

    def note(self, spec: AdapterSpec, *, digest: str, layers_matched: int, is_hit: bool = True) -> None:
        """Note that a request uses an adapter, or where it is no hit, that it was read."""
        entry = self._entries.setdefault(spec.key, _Entry(spec.id, digest, layers_matched))
        entry.digest = digest
        if is_hit:
            entry.hits += 1
            entry.last_used_s = self._clock()
        self._entries.move_to_end(spec.key)
        while len(self._entries) > self._max_remembered:
            self._entries.popitem(last=False)

    def uses(self) -> tuple[AdapterUsage, ...]:
        """Return the use of each adapter that is remembered."""
        return tuple(
            AdapterUsage(key, entry.hits, entry.last_used_s, entry.layers_matched)
            for key, entry in self._entries.items()
        )

    def applied(self, adapter_set: Sequence[tuple[str, Scale]]) -> tuple[ActiveAdapter, ...]:
        """Return what a adapter_set of (digest, scale) holds; a digest that was forgotten is left out."""
        ids = {entry.digest: entry.id for entry in self._entries.values()}
        return tuple(ActiveAdapter(ids[digest], scale) for digest, scale in adapter_set if digest in ids)

    def holdings(
        self, adapter_set: Sequence[tuple[str, Scale]], on_device: Sequence[str], in_host: Sequence[str]
    ) -> tuple[ResidentAdapter, ...]:
        """Return what is held: digests in the weights and on the device, keys in host memory."""
        applied, device, host = {digest for digest, _ in adapter_set}, set(on_device), set(in_host)
        held: list[ResidentAdapter] = []
        for key, entry in self._entries.items():
            if entry.digest in applied:
                held.append(ResidentAdapter(key, entry.id, "applied"))
            elif entry.digest in device:
                held.append(ResidentAdapter(key, entry.id, "device"))
            elif key in host:
                held.append(ResidentAdapter(key, entry.id, "host"))
        return tuple(held)

    def keys_of(self, model: str) -> tuple[str, ...]:
        """Return the keys of all revisions and files of an adapter."""
        return tuple(key for key, entry in self._entries.items() if entry.id == model)

    def digests_of(self, model: str) -> tuple[str, ...]:
        """Return the digests of all revisions and files of an adapter."""
        return tuple(entry.digest for entry in self._entries.values() if entry.id == model)


class ReplicaReporter:
    """What one replica tells of itself and its adapters; it knows those that were noted."""

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
    ) -> None:
        """Know nothing yet; `clock` is in seconds since 1970."""
        self.replica_id = replica_id
        self._base_id = base_id
        self._device = device
        self._abilities = abilities
        self._store = store
        self._weights = weights
        self._uses = AdapterUsageLog(clock=clock)

    def note(self, lease: Lease[ParsedAdapter], *, is_hit: bool) -> None:
        """Note that a request uses an adapter, or where it is no hit, that it was read."""
        adapter = lease.adapter
        self._uses.note(
            lease.spec, digest=adapter.digest, layers_matched=adapter.coverage.layers_matched, is_hit=is_hit
        )

    def report(self, state: WorkerState, holds: Sequence[QuarantineEntry] = ()) -> ReplicaReport:
        """Return what the replica does, as its worker says, holds, and refuses for now."""
        return ReplicaReport(
            id=self.replica_id,
            base_id=self._base_id,
            device=self._device,
            waiting=state.waiting,
            running=state.running,
            backlog_s=state.backlog_s,
            applied=self._uses.applied(state.applied),
            holdings=self._uses.holdings(state.applied, self._weights.cached, self._store.resident()),
            uses=self._uses.uses(),
            quarantined=tuple(QuarantinedAdapters(hold.keys, hold.scales, hold.reason, hold.left_s) for hold in holds),
            abilities=self._abilities,
        )

    def forget(self, model: str) -> bool:
        """Drop an adapter from memory once nobody uses it; say whether it was there."""
        keys = self._uses.keys_of(model)
        was_held = any(self._store.is_resident(key) for key in keys)
        for key in keys:
            self._store.forget(key)
        for digest in self._uses.digests_of(model):
            self._weights.forget(digest)
        return was_held
