"""The replicas as one router knows them: their reports, and the requests it has sent there since.

A request counts against a replica as soon as this router sends it there, until a report of that replica includes it.
Must not know Ray. Time is passed in, in seconds of this process's own clock: no two clocks are compared.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Any

from serve_app.routing.cost import STALLED_S, ReplicaView, RequestLoad
from serve_app.routing.stats import ReplicaStats, decode
from serve_app.work import LatencyModel

# A choice that did not lead to an acceptance so soon did not lead to one.
RESERVATION_TTL_S = 2.0
# An accepted request that a report leaves out so much later has ended: where this process stood still for longer than
# the request took, its end is heard of before its acceptance, and no other end follows.
UNREPORTED_TTL_S = 10.0
# Reported work counts as done while no report comes, but no further than this: the replica may have stopped.
MAX_DECAY_S = 2.0
# Between the id of a request and what tells its parts apart.
PART = "/"
UNKNOWN_PACE = LatencyModel(fixed_s=0.5, unit_s=0.1)


@dataclass(frozen=True, slots=True)
class _Sent:
    """A request sent and not finished; `tag` is what its replica calls it."""

    tag: str
    load: RequestLoad
    seconds: float
    at_s: float
    is_accepted: bool = False


@dataclass(slots=True)
class _Replica:
    heard_s: float
    wire: Mapping[str, Any] | None = None
    held: Container[str] = frozenset[str]()
    stats: ReplicaStats = ReplicaStats(0, 0.0, UNKNOWN_PACE)
    sent: dict[str, _Sent] = field(default_factory=dict[str, _Sent])
    # Of the work reported last, what has ended since.
    ended_s: float = 0.0


class ReplicaStates:
    """One router's knowledge. Not thread-safe."""

    def __init__(self, *, stale_after_s: float = 15.0) -> None:
        """Know no replica; one that is silent for `stale_after_s` while others report is taken to be stalled."""
        self._stale_after_s = stale_after_s
        self._replicas: dict[str, _Replica] = {}
        self._sent_to: dict[str, str] = {}
        self._heard_s = float("-inf")

    def update(self, id_: str, wire: Mapping[str, Any], held: Container[str], now_s: float) -> None:
        """Take in a replica as Serve presents it: its routing stats, and the ids of Ray's record."""
        known = self._replicas.setdefault(id_, _Replica(heard_s=now_s))
        known.held = held
        if known.wire is wire:
            return
        known.wire = wire
        stats = decode(wire)
        if stats is not None and stats.sequence != known.stats.sequence:
            known.stats, known.heard_s, known.ended_s = stats, now_s, 0.0
            self._heard_s = now_s

    def retain(self, ids: Set[str]) -> None:
        """Forget every replica that is not among these."""
        for id_ in self._replicas.keys() - ids:
            for request_id in self._replicas.pop(id_).sent:
                del self._sent_to[request_id]

    def send(self, id_: str, request_id: str, tag: str, load: RequestLoad, now_s: float) -> None:
        """Count a request at a replica, and no longer at any other, until it is reported, ends or came to nothing."""
        self.withdraw(request_id)
        known = self._replicas.get(id_)
        if known is not None and load.units > 0:
            known.sent[request_id] = _Sent(tag, load, known.stats.pace.seconds(load.units), now_s)
            self._sent_to[request_id] = id_

    def accept(self, id_: str, request_id: str) -> None:
        """Note that a replica has taken the request that was sent to it."""
        known = self._replicas.get(id_)
        if known is not None and request_id in known.sent:
            known.sent[request_id] = replace(known.sent[request_id], is_accepted=True)

    def finish(self, id_: str, request_id: str) -> None:
        """Count a request, or the oldest part of it there, no more: it ended, or the replica refused it.

        One that is elsewhere by now stays there. The id of a part is that of its request, `PART` and more.
        """
        known = self._replicas.get(id_)
        if known is None:
            return
        whole = request_id + PART
        found = next((key for key in known.sent if key == request_id or key.startswith(whole)), None)
        if found is not None:
            sent = known.sent[found]
            if sent.tag in known.stats.counted:
                known.ended_s += sent.seconds
            self.withdraw(found)

    def withdraw(self, request_id: str) -> None:
        """Count a request nowhere."""
        known = self._replicas.get(self._sent_to.pop(request_id, ""))
        if known is not None:
            known.sent.pop(request_id, None)

    def view(self, id_: str, now_s: float) -> ReplicaView | None:
        """Return what is known of one replica at this moment; None for one that is not known."""
        known = self._replicas.get(id_)
        return None if known is None else self._view(id_, known, now_s)

    def views(self, now_s: float) -> list[ReplicaView]:
        """Return what is known of every replica at this moment."""
        return [self._view(id_, known, now_s) for id_, known in self._replicas.items()]

    def _view(self, id_: str, known: _Replica, now_s: float) -> ReplicaView:
        stats = known.stats
        ahead_s = stats.ahead_s
        if ahead_s < STALLED_S:
            ahead_s = max(ahead_s - max(min(now_s - known.heard_s, MAX_DECAY_S), known.ended_s), 0.0)
        if known.heard_s < self._heard_s - self._stale_after_s:
            ahead_s = STALLED_S
        if not known.sent:
            return ReplicaView(id_, ahead_s, stats.pace, (known.held,), stats.fused)
        ahead_s += sum(sent.seconds for sent in self._unreported(known, now_s))
        coming = {need.key for sent in known.sent.values() for need in sent.load.adapters}
        fused = stats.fused.union(sent.load.composition for sent in known.sent.values())
        return ReplicaView(id_, ahead_s, stats.pace, (known.held, coming), fused)

    def _unreported(self, known: _Replica, now_s: float) -> list[_Sent]:
        """Return what a replica was sent and has not reported; drop what never came to it or is no longer there."""
        unreported: list[_Sent] = []
        for request_id, sent in list(known.sent.items()):
            if sent.tag in known.stats.counted:
                continue
            never_came = not sent.is_accepted and now_s > sent.at_s + RESERVATION_TTL_S
            if never_came or known.heard_s > sent.at_s + UNREPORTED_TTL_S:
                self.withdraw(request_id)
            else:
                unreported.append(sent)
        return unreported
