"""How many replicas of each base run and start, and why none does, as Serve says.

Owns the asking: at most once a second for all callers, under a time limit.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from serve_app.catalog.reading.blocking import run_blocking

COUNTS_TTL_S = 1.0
ANSWER_TIMEOUT_S = 1.0
# Serve types its states as an enumeration, and sends them as text.
RUNNING: Any = "RUNNING"
STARTING: Any = "STARTING"
_UNUSABLE = re.compile(r"BaseUnusable: .+? cannot be served: (.+)")


@dataclass(frozen=True, slots=True)
class ReplicaCount:
    """How many replicas of one deployment run and how many start; `failure` says why none runs, where that is known."""

    running: int = 0
    starting: int = 0
    failure: str | None = None


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


def count_replicas(app_name: str, deployments: Mapping[str, str]) -> Mapping[str, ReplicaCount]:
    """Return the counts of an application's bases, whose deployments are given by their ids. Blocks."""
    application = serve.status().applications.get(app_name)
    known = {} if application is None else application.deployments
    return {base: _count(known[name]) for base, name in deployments.items() if name in known}


def _count(overview: Any) -> ReplicaCount:
    states: Mapping[Any, int] = overview.replica_states
    running = states.get(RUNNING, 0)
    failure = None if running else start_failure(overview.message, has_given_up=overview.status == "DEPLOY_FAILED")
    return ReplicaCount(running, states.get(STARTING, 0), failure)


def start_failure(message: str, *, has_given_up: bool) -> str | None:
    """Return why a deployment's replicas do not start, by Serve's message, which ends in the error of the last one.

    A base that cannot be served is known by our own sentence; for any other error Serve's last try is waited for.
    """
    found = _UNUSABLE.findall(message)
    if found:
        return found[-1]
    return "its replicas end while they start; a log of theirs says why" if has_given_up else None
