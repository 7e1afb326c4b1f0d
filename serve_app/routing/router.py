"""The router of a base's requests, as Serve runs it in every process that holds a handle to the base.

Owns the way between Serve's router interface and `serve_app.routing.ledger` and `cost`, and how Serve is told of it.
Must not decide anything itself. Serve marks the interface as alpha: `docs/routing.md` names what is used of it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from random import Random
from typing import Any

from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import FIFOMixin, PendingRequest, ReplicaID, RequestRouter, RunningReplica

from serve_app.config import AppConfig, BaseModelConfig
from serve_app.core import GenerationRequest
from serve_app.observability.metrics import RouterMetrics
from serve_app.observability.tracing import record
from serve_app.routing.cost import RequestLoad, RequiredAdapter, demand_of, rank
from serve_app.routing.ledger import TYPICAL_BYTES, ReplicaSnapshot, ReplicaStateCache

log = logging.getLogger(__name__)

# Who has waited so long has found every replica full: the next place is his, whoever asks at the right moment.
TURN_AFTER_S = 0.1


def router_config(base: BaseModelConfig, config: AppConfig) -> RequestRouterConfig:
    """Return what Serve is to route a base's requests with."""
    settings = base.router
    if settings.policy == "ray":
        return RequestRouterConfig()
    # Serve annotates the fields of this model in a way that type checkers misread.
    fields: dict[str, Any] = {
        # By name: every process that holds a handle imports it for itself.
        "request_router_class": f"{__name__}:PredictedFinishRouter",
        "request_router_kwargs": {
            "base_id": base.id,
            "disk_bytes": int(config.disk_cache),
            "stale_after_s": settings.stale_after_s,
        },
        "request_routing_stats_period_s": settings.stats_period_s,
        "max_backoff_s": settings.max_backoff_s,
    }
    return RequestRouterConfig(**fields)


class PredictedFinishRouter(FIFOMixin, RequestRouter):
    """Sends each request to the replica that is predicted to finish it at the least cost.

    Where all replicas are full, those who wait get the places that become free in their order.
    """

    def initialize_state(self, **kwargs: Any) -> None:
        """Start with what the deployment's `request_router_kwargs` say: `base_id`, `disk_bytes`, `stale_after_s`."""
        self._rng = Random()  # spreads ties; nothing else is left to chance
        self._base_id: str = kwargs["base_id"]
        self._ledger = ReplicaStateCache(
            disk_bytes=int(kwargs["disk_bytes"]), stale_after_s=float(kwargs["stale_after_s"])
        )
        self._metrics = RouterMetrics(self._base_id)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return one replica per rank, best first: Serve takes the first that is not full."""
        now_s = time.time()
        self._sight(candidate_replicas, now_s)
        demand = self._ledger.with_short_keys(_demanded(pending_request))
        ranks = rank(demand, self._ledger.refresh_views(now_s), self._ledger.costs, rng=self._rng)
        by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        order = [id_ for members in ranks for id_ in members]
        if pending_request is not None and order:
            # Without it Serve asks again and again without a pause while all replicas are full.
            pending_request.routing_context.should_backoff = True
            # Booked at the choice, not at the acceptance: others choose in between.
            self._ledger.add_in_flight(order[0], pending_request.metadata.internal_request_id, demand, now_s)
        return [[by_id[id_]] for id_ in order]

    def _fulfill_next_pending_request(self, replica: RunningReplica, request_metadata: Any = None) -> None:
        """Give a place to who it was chosen for; once somebody waits for one, to who has waited longest."""
        first = next((waiting for waiting in self._pending_requests_to_fulfill if not waiting.future.done()), None)
        if first is not None and time.time() - first.created_at >= TURN_AFTER_S:
            super()._fulfill_next_pending_request(replica, request_metadata)
        else:
            RequestRouter._fulfill_next_pending_request(self, replica, request_metadata)

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Count a request where a replica has taken it, which may be another than the one chosen first."""
        now_s = time.time()
        id_, request_id = replica_id.unique_id, pending_request.metadata.internal_request_id
        place = self._ledger.accepted(id_, request_id, now_s)
        if place is None:
            self._ledger.add_in_flight(id_, request_id, self._ledger.with_short_keys(_demanded(pending_request)), now_s)
            place = self._ledger.accepted(id_, request_id, now_s)
        if place is not None:
            self._metrics.routed(place)
            _tell(pending_request, id_, place, now_s)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Count a request no more."""
        self._ledger.finished(replica_id.unique_id, internal_request_id)

    def _sight(self, replicas: Sequence[RunningReplica], now_s: float) -> None:
        """Take in which replicas there are, and what those have told that have told anything new."""
        ledger = self._ledger
        for replica in replicas:
            id_, stats = replica.replica_id.unique_id, replica.routing_stats
            if not ledger.has_seen(id_, stats):
                held = frozenset(replica.multiplexed_model_ids)
                ledger.update_snapshot(ReplicaSnapshot(id_, replica.node_id, stats, held), now_s)
        if ledger.count() != len(replicas):
            ledger.retain({replica.replica_id.unique_id for replica in replicas})


def _tell(pending: PendingRequest, replica_id: str, place: str, now_s: float) -> None:
    """Log and trace where a generation goes; this thread of Serve's knows no request, so the line names it."""
    request = _generation(pending)
    if request is None:
        return
    log.info(
        "request %s for %s goes to replica %s, adapters there: %s",
        request.request_id, request.base_id, replica_id, place, extra={"request_id": request.request_id},
    )  # fmt: skip
    # The books and the line above took their time since `now_s`; the span is not to begin as much too late.
    began_ago_s, waited_s = time.time() - pending.created_at, now_s - pending.created_at
    record("route", request.trace, began_ago_s=began_ago_s, lasted_s=waited_s, replica=replica_id, place=place)


def _generation(pending: PendingRequest) -> GenerationRequest | None:
    arguments = (*pending.args, *pending.kwargs.values())
    return next((argument for argument in arguments if isinstance(argument, GenerationRequest)), None)


def _demanded(pending: PendingRequest | None) -> RequestLoad:
    """Return what a call asks for; a call that is no generation asks for nothing but an answer."""
    if pending is None:
        return RequestLoad((), 0.0)
    request = _generation(pending)
    if request is not None:
        return demand_of(request)
    model_id = pending.metadata.multiplexed_model_id
    return RequestLoad((RequiredAdapter(model_id, TYPICAL_BYTES),) if model_id else (), 0.0)
