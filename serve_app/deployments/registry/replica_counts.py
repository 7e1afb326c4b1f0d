"""How many replicas of each base run and start, since when, and why none does, as Serve says.

Owns the asking: at most once a second for all callers, under a time limit.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import ray.serve.context
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationDetails, DeploymentDetails, ServeInstanceDetails

from serve_app.catalog.reading.blocking import run_blocking

COUNTS_TTL_S = 1.0
ANSWER_TIMEOUT_S = 1.0
_UNUSABLE = re.compile(r"BaseUnusable: .+? cannot be served: (.+)")


@dataclass(frozen=True, slots=True)
class ReplicaCount:
    """How many replicas of one deployment run and how many start; `failure` says why none runs, where that is known.

    The oldest of those that start was asked for at `since_s`, in seconds since 1970; `is_placed` says that one of them
    has a process on some node. `is_absent` says that there is no application of the base's name.
    """

    running: int = 0
    starting: int = 0
    failure: str | None = None
    since_s: float | None = None
    is_placed: bool = False
    is_absent: bool = False


@dataclass(frozen=True, slots=True)
class Place:
    """Where a base is deployed."""

    application: str
    deployment: str


class ReplicaCounts:
    """The counts of all bases, by their ids."""

    def __init__(
        self,
        ask: Callable[[], Mapping[str, ReplicaCount]],
        *,
        clock: Callable[[], float],
        answer_timeout_s: float = ANSWER_TIMEOUT_S,
    ) -> None:
        """`ask` may block; `clock` is in monotonic seconds."""
        self._ask = ask
        self._clock = clock
        self._answer_timeout_s = answer_timeout_s
        self._lock = asyncio.Lock()
        self._counts: Mapping[str, ReplicaCount] = {}
        self._asked_at = float("-inf")

    async def __call__(self) -> Mapping[str, ReplicaCount]:
        """Return what Serve says now, or said at most a second ago, or where it gives no answer, said last."""
        async with self._lock:
            if self._clock() - self._asked_at >= COUNTS_TTL_S:
                with contextlib.suppress(RayError, RayServeException, TimeoutError):
                    # A thread of its own, so that health does not wait for other work.
                    self._counts = await run_blocking(self._ask, timeout_s=self._answer_timeout_s)
                self._asked_at = self._clock()
        return self._counts


def count_replicas(places: Mapping[str, Place]) -> Mapping[str, ReplicaCount]:
    """Return the counts of bases by their ids; none of those whose applications are being built. Blocks."""
    applications = _applications()
    if applications is None:
        return {}
    counts = {base: _count_in(applications.get(place.application), place) for base, place in places.items()}
    return {base: count for base, count in counts.items() if count is not None}


def _count_in(application: ApplicationDetails | None, place: Place) -> ReplicaCount | None:
    if application is None:
        return ReplicaCount(failure=f"there is no application {place.application}", is_absent=True)
    deployment = application.deployments.get(place.deployment)
    if deployment is not None:
        return count_of(deployment)
    if application.status == "DEPLOY_FAILED":
        return ReplicaCount(failure=f"application {place.application} cannot be built; the controller's log says why")
    return None


def asked_for_at(app_name: str, deployment: str, replica_id: str) -> float | None:
    """Return when Serve asked for a replica, in seconds since 1970; None where it does not know it. Blocks."""
    application = (_applications() or {}).get(app_name)
    found = None if application is None else application.deployments.get(deployment)
    replicas = () if found is None else found.replicas
    return next((one.start_time_s for one in replicas if one.replica_id == replica_id), None)


def _applications() -> Mapping[str, ApplicationDetails] | None:
    # `serve.status` asks the same, and leaves out the replicas.
    client = ray.serve.context._get_global_client(raise_if_no_controller_running=False)
    return None if client is None else ServeInstanceDetails(**client.get_serve_details()).applications


def count_of(deployment: DeploymentDetails) -> ReplicaCount:
    """Return the counts of a deployment."""
    running = sum(replica.state == "RUNNING" for replica in deployment.replicas)
    starting = [replica for replica in deployment.replicas if replica.state == "STARTING"]
    has_given_up = deployment.status == "DEPLOY_FAILED"
    return ReplicaCount(
        running,
        len(starting),
        failure=None if running else start_failure(deployment.message, has_given_up=has_given_up),
        since_s=min((replica.start_time_s for replica in starting), default=None),
        is_placed=any(replica.node_id is not None for replica in starting),
    )


def start_failure(message: str, *, has_given_up: bool) -> str | None:
    """Return why a deployment's replicas do not start, by Serve's message, which ends in the error of the last one.

    A base that cannot be served is known by our own sentence; for any other error Serve's last try is waited for.
    """
    found = _UNUSABLE.findall(message)
    if found:
        return found[-1]
    return "its replicas end while they start; a log of theirs says why" if has_given_up else None
