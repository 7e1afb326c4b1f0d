"""The router of a base's requests, as Serve runs it in every process that holds a handle to the base.

Owns the way between Serve's public router interface and `serve_app.routing.fleet` and `cost`, and which requests ask
for a slot while all replicas are full. `docs/routing.md` names what is used of the interface, which Serve marks alpha.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable
from random import Random
from typing import Any

from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import (
    FIFOMixin,
    MultiplexMixin,
    PendingRequest,
    ReplicaID,
    RequestRouter,
    RunningReplica,
)

from serve_app.config import BaseModelConfig
from serve_app.core import GenerationRequest
from serve_app.observability.metrics import RouterMetrics
from serve_app.observability.tracing import record
from serve_app.routing.cost import ReplicaView, RequestLoad, RequiredAdapter, load_of, rank, tier_of
from serve_app.routing.fleet import PART, ReplicaStates
from serve_app.routing.known import announce, joined
from serve_app.routing.stats import request_tag

log = logging.getLogger(__name__)

# Serve asks each replica that it is given for its queue's length, one after the other, until one is not full.
MAX_RANKED = 2
# Of the requests that wait for a slot, only the first ask for one; the others would only ask the same replicas.
MAX_ASKING = 8
# The assumed size of an adapter of which only the id is known.
TYPICAL_BYTES = 100_000_000


def router_config(base: BaseModelConfig) -> RequestRouterConfig:
    """Return what Serve is to route a base's requests with."""
    settings = base.router
    if settings.policy == "ray":
        return RequestRouterConfig()
    # Serve annotates the fields of this model in a way that type checkers misread.
    fields: dict[str, Any] = {
        # By name: every process that holds a handle imports it for itself.
        "request_router_class": f"{__name__}:{LeastWorkRouter.__name__}",
        "request_router_kwargs": {"base_id": base.id, "stale_after_s": settings.stale_after_s},
        "request_routing_stats_period_s": settings.stats_period_s,
        "max_backoff_s": settings.max_backoff_s,
    }
    return RequestRouterConfig(**fields)


class LeastWorkRouter(FIFOMixin, MultiplexMixin, RequestRouter):
    """Sends each request to the replica with the least work ahead, unless another needs no fetch or swap for it.

    Where all replicas are full, slots that become free go to the requests that have waited longest.
    """

    def initialize_state(self, **kwargs: Any) -> None:
        """Start with what the deployment's `request_router_kwargs` say: `base_id` and `stale_after_s`."""
        self._rng = Random()  # spreads ties; nothing else is left to chance
        self._states = ReplicaStates(stale_after_s=float(kwargs["stale_after_s"]))
        self._base_id = str(kwargs["base_id"])
        self._metrics = RouterMetrics(self._base_id)
        self._unrouted: dict[str, PendingRequest] = {}

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return one replica per rank, best first; none where older requests are to ask for a slot first."""
        if not candidate_replicas:
            return []
        announce(self._base_id, self)
        load = _load(pending_request)
        if pending_request is not None:
            # Without it Serve asks again and again without a pause while all replicas are full.
            pending_request.routing_context.should_backoff = True
            self._states.withdraw(_key(pending_request))
            if not self._may_ask(pending_request):
                return []
        now_s = time.monotonic()
        order = rank(load, self._views(candidate_replicas, now_s), rng=self._rng)
        if pending_request is not None:
            # Counted at the choice, not at the acceptance: others choose in between.
            self._send(order[0], pending_request, load, now_s)
        return self._few(order, candidate_replicas)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Take in the replicas that run now, as Serve knows them."""
        before = self.curr_replicas.keys()
        has_joined = bool(before) and any(replica.replica_id not in before for replica in replicas)
        super().update_replicas(replicas)
        if has_joined:
            joined(self._base_id)

    @property
    def num_replicas(self) -> int:
        """How many replicas run; from any thread."""
        return len(self.curr_replicas)

    async def views(self) -> list[ReplicaView]:
        """Return what is known of every replica at this moment."""
        return self._views(list(self.curr_replicas.values()), time.monotonic())

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Count a request where a replica has taken it, which may be another than the one chosen first."""
        id_, request_id = replica_id.unique_id, _key(pending_request)
        load = _load(pending_request)
        self._unrouted.pop(request_id, None)
        now_s = time.monotonic()
        self._states.withdraw(request_id)
        view = self._states.view(id_, now_s)
        self._send(id_, pending_request, load, now_s)
        self._states.accept(id_, request_id)
        if view is not None and load.units:
            tier = tier_of(load, view)
            self._metrics.routed(tier)
            _tell(pending_request, id_, tier)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Count a request no more."""
        self._states.finish(replica_id.unique_id, internal_request_id)

    def _views(self, replicas: list[RunningReplica], now_s: float) -> list[ReplicaView]:
        for replica in replicas:
            id_ = replica.replica_id.unique_id
            self._states.update(id_, replica.routing_stats, replica.multiplexed_model_ids, now_s)
        self._states.retain({replica.replica_id.unique_id for replica in replicas})
        return self._states.views(now_s)

    def _may_ask(self, request: PendingRequest) -> bool:
        """Whether a request is among the first of those that have no slot yet: callers take turns."""
        self._unrouted = {id_: other for id_, other in self._unrouted.items() if not other.future.done()}
        self._unrouted[_key(request)] = request
        return request in by_turns(list(self._unrouted.values()))[:MAX_ASKING]

    def _few(self, order: list[str], replicas: list[RunningReplica]) -> list[list[RunningReplica]]:
        """Return the best of those that are not known to be full, or where all are, the best."""
        by_id = {replica.replica_id.unique_id: replica for replica in replicas}
        ranked = [by_id[id_] for id_ in order]
        free = [one for one in ranked if not self._is_full(one)][:MAX_RANKED]
        if not free:
            return [[one] for one in ranked[:MAX_RANKED]]
        if free[0] is ranked[0]:
            return [[one] for one in free]
        # Serve takes the one with room, and asks the better one on the side whether it still is full.
        return [[free[0], ranked[0]], *([one] for one in free[1:])]

    def _is_full(self, replica: RunningReplica) -> bool:
        return (self.replica_queue_len_cache.get(replica.replica_id) or 0) >= replica.max_ongoing_requests

    def _send(self, id_: str, request: PendingRequest, load: RequestLoad, now_s: float) -> None:
        generation = _generation(request)
        if generation is not None:
            tag = request_tag(generation)
            self._states.send(id_, _key(request), tag, load, now_s)


def by_turns(requests: Iterable[PendingRequest]) -> list[PendingRequest]:
    """Sort requests by turns of their callers: of each caller first what is interactive, then what is older."""
    turns: Counter[str] = Counter()
    order: list[tuple[int, float, int]] = []
    known = sorted(requests, key=lambda request: (_is_batch(request), request.created_at))
    for place, request in enumerate(known):
        generation = _generation(request)
        share = "" if generation is None else generation.share
        order.append((turns[share], request.created_at, place))
        turns[share] += 1
    return [known[place] for _, _, place in sorted(order)]


def _is_batch(pending: PendingRequest) -> bool:
    request = _generation(pending)
    return request is not None and request.priority == "batch"


def _tell(pending: PendingRequest, replica_id: str, tier: str) -> None:
    """Log and trace where a generation goes; this thread of Serve's knows no request, so the line names it."""
    request = _generation(pending)
    if request is None:
        return
    log.info(
        "request %s for %s goes to replica %s, adapters there: %s",
        request.request_id, request.base_id, replica_id, tier, extra={"request_id": request.request_id},
    )  # fmt: skip
    waited_s = time.time() - pending.created_at
    record("route", request.trace, began_ago_s=waited_s, lasted_s=waited_s, replica=replica_id, tier=tier)


def _generation(pending: PendingRequest) -> GenerationRequest | None:
    arguments = (*pending.args, *pending.kwargs.values())
    return next((argument for argument in arguments if isinstance(argument, GenerationRequest)), None)


def _key(pending: PendingRequest) -> str:
    """Return what tells a call from others: all calls that one HTTP request makes have its id in Serve."""
    request = _generation(pending)
    tag = "" if request is None else request_tag(request)
    return pending.metadata.internal_request_id + PART + tag


def _load(pending: PendingRequest | None) -> RequestLoad:
    """Return what a call asks for; a call that is no generation asks for nothing but an answer."""
    request = None if pending is None else _generation(pending)
    if request is not None:
        return load_of(request)
    model_id = "" if pending is None else pending.metadata.multiplexed_model_id
    return RequestLoad((RequiredAdapter(model_id, TYPICAL_BYTES),) if model_id else (), 0.0, model_id)
