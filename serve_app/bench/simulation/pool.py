"""The replicas of one base as the simulator knows them, and what a router can see of them.

Owns the tables that every router reads: what is where, what waits where, who takes requests. Must not decide anything.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from serve_app.routing.cost import BASE_ALONE, ReplicaView
from serve_app.store.budget import ByteBudget
from serve_app.work import LatencyModel

# The state of an adapter on a replica, as bits.
ARRIVING, ON_HOST, ON_DISK = 1, 2, 4


class Pool:
    """Tables with a column for each replica; those of one node are neighbours.

    `end_s` is when the running pass ends, `queued_s` the predicted work accepted and not begun, `is_open` whether
    a replica takes requests. `last` has the tag of the composition that will be in the weights once all accepted work
    is done.
    """

    def __init__(self, size: int, *, per_node: int, host_bytes: int, disk_bytes: int) -> None:
        self.size = size
        self.per_node = per_node
        self.host_bytes, self.disk_bytes = host_bytes, disk_bytes
        self.end_s: NDArray[np.float64] = np.zeros(size)
        self.queued_s: NDArray[np.float64] = np.zeros(size)
        self.ongoing: NDArray[np.int64] = np.zeros(size, dtype=np.int64)
        self.is_open: NDArray[np.bool_] = np.zeros(size, dtype=bool)
        self.models: NDArray[np.int64] = np.zeros(size, dtype=np.int64)
        self.last: NDArray[np.object_] = np.full(size, BASE_ALONE, dtype=object)
        self.host: list[set[str]] = [set() for _ in range(size)]
        self.arriving: list[dict[str, float]] = [{} for _ in range(size)]
        self.disk: list[set[str]] = [set() for _ in range(-(-size // per_node))]
        self.disk_budgets = [ByteBudget(disk_bytes) for _ in self.disk]
        # When a node will have what it fetches, so that its replicas fetch it once.
        self.disk_arriving: list[dict[str, float]] = [{} for _ in self.disk]
        self._rows: dict[str, NDArray[np.int16]] = {}

    def row(self, key: str) -> NDArray[np.int16]:
        """Return where an adapter is: the bits of every replica."""
        row = self._rows.get(key)
        if row is None:
            row = self._rows[key] = np.zeros(self.size, dtype=np.int16)
        return row

    def backlog_s(self, now_s: float) -> NDArray[np.float64]:
        """Return the predicted time of what every replica has accepted and not finished."""
        return np.maximum(self.end_s - now_s, 0.0) + self.queued_s

    def view(self, index: int, now_s: float, pace: LatencyModel) -> ReplicaView:
        """Return what production's router would know of a replica."""
        return ReplicaView(
            id=str(index),
            ahead_s=max(float(self.end_s[index]) - now_s, 0.0) + float(self.queued_s[index]),
            pace=pace,
            held=(self.host[index], self.arriving[index]),
            fused={self.last[index]},
        )

    def set_arriving(self, index: int, key: str, until_s: float) -> None:
        """Note that an adapter is on its way to a replica."""
        self.arriving[index][key] = until_s
        self.row(key)[index] |= ARRIVING

    def host_changed(self, index: int, added: str | None, dropped: tuple[str, ...]) -> None:
        """Note what host memory holds now."""
        held = self.host[index]
        if added is not None:
            if self.arriving[index].pop(added, None) is not None:
                self.row(added)[index] &= ~ARRIVING
            held.add(added)
            self.row(added)[index] |= ON_HOST
        for key in dropped:
            held.discard(key)
            self.row(key)[index] &= ~ON_HOST
        self.models[index] = len(held)

    def to_disk(self, node: int, key: str, size_bytes: int) -> None:
        """Put an adapter on a node's disk, and drop what that evicts."""
        plan = self.disk_budgets[node].add(key, size_bytes)
        columns = slice(node * self.per_node, (node + 1) * self.per_node)
        self.disk_arriving[node].pop(key, None)
        self.disk[node].add(key)
        self.row(key)[columns] |= ON_DISK
        for dropped in plan.evict:
            self.disk[node].discard(dropped)
            self.row(dropped)[columns] &= ~ON_DISK
