"""The blows of the chaos run: what is killed, when that may be, and how long until it is replaced.

A blow waits while it would take the last running replica of a base or of the ingress: that is an outage that a service
of this size cannot but have. How often and how long blows waited is part of the report.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import psutil
from ray.serve.context import _get_global_client

from cluster.local_cluster import LocalCluster, NodeShape, raylet_of
from tests.faults.breaking import Part, kill, parts

BASE, INGRESS, NODE = "base replica", "ingress replica", "node"
# Drawn from like cards, and shuffled again when all are out. A node takes both with it, and so comes half as often.
CARDS = (BASE, BASE, INGRESS, INGRESS, NODE)
POLL_S = 0.25
INGRESS_DEPLOYMENT = "LoraplexIngress"


@dataclass(slots=True)
class Blow:
    """One kill, `waited_s` after it was due.

    It is made good when, of each deployment that lost something, as many replicas have come to run as were lost up to
    and with it; `made_good_s` is None until then.
    """

    kind: str
    at: float
    waited_s: float
    lost: tuple[str, ...] = ()
    lost_so_far: dict[str, int] = field(default_factory=dict)
    made_good_s: float | None = None


@dataclass
class Breaker:
    """Kills at random; for the main thread, since Ray starts nodes in no other."""

    cluster: LocalCluster
    shape: NodeShape
    nodes: int
    wanted: dict[str, int]
    rng: random.Random
    period_s: float = 10.0
    blows: list[Blow] = field(default_factory=list)
    lost: Counter[str] = field(default_factory=Counter)
    cards: list[str] = field(default_factory=list)
    is_over: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Strike every period until it is over."""
        due = time.monotonic() + self.period_s
        while not self.is_over.is_set():
            self._look()
            now = time.monotonic()
            if now >= due and self._strike(now - due):
                due = max(due + self.period_s, now)
            self.is_over.wait(POLL_S)

    def settle(self, timeout_s: float) -> bool:
        """Wait until the service is whole, and say whether it came to be."""
        until = time.monotonic() + timeout_s
        while not self._look():
            if time.monotonic() > until:
                return False
            time.sleep(POLL_S)
        return True

    def _strike(self, waited_s: float) -> bool:
        """Kill what the first card says that can be spared now; say whether there was one."""
        self.cards = self.cards or self.rng.sample(CARDS, len(CARDS))
        for kind in self.cards:
            victims = list(self._victims(kind))
            if victims:
                blow = Blow(kind, time.monotonic(), waited_s)
                self.blows.append(blow)
                self.cards.remove(kind)
                self._kill(blow, self.rng.choice(victims))
                return True
        return False

    def _victims(self, kind: str) -> Iterator[str | Part]:
        """Yield what may be killed: parts of which another runs, nodes without which each part still runs."""
        serving = self._serving()
        if kind == NODE:
            yield from (node for node in self.cluster.nodes if self._can_spare(node, serving))
            return
        count = Counter(part.deployment for part in serving)
        for part in serving:
            if (part.deployment == INGRESS_DEPLOYMENT) == (kind == INGRESS) and count[part.deployment] > 1:
                yield part

    def _can_spare(self, node: str, serving: list[Part]) -> bool:
        is_used = any(part.node == node for part in serving)
        elsewhere = {part.deployment for part in serving if part.node != node}
        return is_used and len(self.cluster.nodes) == self.nodes and elsewhere == set(self.wanted)

    def _kill(self, blow: Blow, victim: str | Part) -> None:
        if isinstance(victim, Part):
            kill(victim.pid)
            self._note(blow, (victim.deployment,))
            return
        here = tuple(part.deployment for part in self._present() if part.node == victim)
        raylet = psutil.Process(raylet_of(victim))
        workers = raylet.children(recursive=True)
        for process in (raylet, *workers):
            kill(process.pid)
        self._note(blow, here)
        self.cluster.kill(victim)
        self.cluster.grow(1, self.shape)

    def _note(self, blow: Blow, lost: tuple[str, ...]) -> None:
        self.lost.update(lost)
        blow.lost = lost
        blow.lost_so_far = {name: self.lost[name] for name in lost}

    def _present(self) -> list[Part]:
        return [part for part in parts() if part.deployment in self.wanted]

    def _serving(self) -> list[Part]:
        """Return the replicas that run: Serve takes a dead one for running until it has noticed."""
        running = running_pids()
        return [part for part in self._present() if part.pid in running]

    def _look(self) -> bool:
        """Note what was made good, and say whether the service is whole."""
        serving = Counter(part.deployment for part in self._serving())
        came = {name: serving[name] - count + self.lost[name] for name, count in self.wanted.items()}
        for blow in self.blows:
            if blow.made_good_s is None and all(came[name] >= so_far for name, so_far in blow.lost_so_far.items()):
                blow.made_good_s = time.monotonic() - blow.at
        return len(self.cluster.nodes) == self.nodes and serving == self.wanted


def running_pids() -> set[int]:
    """Return the processes of the replicas that Serve takes for running; its public status only counts them."""
    details = _get_global_client().get_serve_details()
    deployments = [one for app in details["applications"].values() for one in app["deployments"].values()]
    replicas = [replica for deployment in deployments for replica in deployment["replicas"]]
    return {replica["pid"] for replica in replicas if replica["state"] == "RUNNING"}
