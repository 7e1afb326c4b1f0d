"""The bases that share a cluster's GPUs, as their policies in Serve's controller see them.

Owns what the policies of all applications know of each other; they run in one process, one after the other. Must not
decide who gets a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from weakref import WeakKeyDictionary

from serve_app.autoscaling.sharing import BaseNeed, History, Share, share_gpus

# Serve asks each policy once a round. One that is left out for so many rounds is of an application that is being
# deleted: it keeps what it has until it is gone.
SILENT_ROUNDS = 3
# So long the number of GPUs is taken to be what it was.
COUNTED_FOR_S = 5.0


@dataclass(slots=True)
class _Row:
    """A base as it was when its policy was asked last; `cluster_gpus` is what it was told that the cluster may have."""

    need: BaseNeed
    cluster_gpus: float | None
    history: History = field(default_factory=History)
    asked_in: int = 0
    waits_since_s: float | None = None


class Cluster:
    """What is known of all bases. A base is gone with its policy."""

    def __init__(self, count_gpus: Callable[[], float], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._count_gpus = count_gpus
        self.clock = clock
        self._rows: WeakKeyDictionary[object, _Row] = WeakKeyDictionary()
        self._round = 0
        self._shares: dict[object, Share] = {}
        self._counted: tuple[float, float] | None = None

    def join(self, policy: object, need: BaseNeed, cluster_gpus: float | None) -> None:
        """Take in a base that Serve has just been told of."""
        self._rows[policy] = _Row(need, cluster_gpus, asked_in=self._round)

    def share(self, policy: object, need: BaseNeed, *, running: int, is_quiet: bool) -> Share:
        """Return what a base is to have that has this need now, of which the cluster knows when what became so."""
        if not need.gpus:
            return Share(need.wanted)
        now_s = self.clock()
        row = self._rows[policy]
        if row.asked_in == self._round:
            self._round += 1
            self._shares = {}
        row.history.see(running, is_quiet=is_quiet, now_s=now_s)
        if running or is_quiet:
            row.waits_since_s = None
        elif row.waits_since_s is None:
            row.waits_since_s = now_s
        if row.waits_since_s is not None:
            is_starting = need.present > 0
            need = replace(need, is_fixed=is_starting, waits_s=None if is_starting else row.waits_since_s)
        row.asked_in, row.need = self._round, need
        if policy not in self._shares:
            self._shares = self._decide(now_s)
        return self._shares[policy]

    def _decide(self, now_s: float) -> dict[object, Share]:
        needs = {policy: self._need(row) for policy, row in self._rows.items() if row.need.gpus}
        told = max((row.cluster_gpus for row in self._rows.values() if row.cluster_gpus is not None), default=None)
        # A cluster that may grow does so for replicas that find no room: only for a base without any are some taken.
        if told is None and not any(need.waits_s is not None or need.is_fixed for need in needs.values()):
            return {policy: Share(need.wanted) for policy, need in needs.items()}
        gpus = self._counted_gpus(now_s) if told is None else told
        return share_gpus(needs, gpus, now_s) if gpus else {key: Share(need.wanted) for key, need in needs.items()}

    def _need(self, row: _Row) -> BaseNeed:
        """Return what a base has and wants now, though its policy may not be asked."""
        if self._round - row.asked_in >= SILENT_ROUNDS:
            return replace(row.need, wanted=0, waits_s=None, is_fixed=True)
        past = row.history
        return replace(row.need, came_s=past.came_s, grew_s=past.grew_s, quiet_s=past.quiet_s)

    def _counted_gpus(self, now_s: float) -> float:
        if self._counted is None or now_s - self._counted[0] >= COUNTED_FOR_S:
            self._counted = (now_s, self._count_gpus())
        return self._counted[1]
