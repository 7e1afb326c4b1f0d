"""The replicas of every base as one ingress replica sees them: what each holds and does, asked of all at once.

Owns the asking: under a time limit, shared by all callers, and remembered for a moment. Also has replicas forget or
fetch an adapter.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from serve_app.catalog.reading.blocking import run_blocking
from serve_app.catalog.replica_report import ReplicaReport
from serve_app.core import AdapterSpec, HubToken
from serve_app.deployments.registry.replica_counts import ReplicaCount
from serve_app.errors import LoraplexError, NotReady

log = logging.getLogger(__name__)

REPORTS_TTL_S = 1.0
ANSWER_TIMEOUT_S = 1.0
FORGET_TIMEOUT_S = 5.0


class Fleet:
    """The replicas of every base of one service."""

    def __init__(
        self,
        handles: Mapping[str, DeploymentHandle],
        counts: Callable[[], Awaitable[Mapping[str, ReplicaCount]]],
        *,
        clock: Callable[[], float],
        bases: Iterable[str] | None = None,
        answer_timeout_s: float = ANSWER_TIMEOUT_S,
    ) -> None:
        """`bases` are those of `handles` that count, None for all; `counts` returns how many replicas of each base
        there are; `clock` is in monotonic seconds."""
        self._handles = handles
        self._counts = counts
        self._clock = clock
        self._answer_timeout_s = answer_timeout_s
        self._lock = asyncio.Lock()
        self._reports: tuple[ReplicaReport, ...] = ()
        self._asked_at = float("-inf")
        self._last: dict[str, dict[str, ReplicaReport]] = {base: {} for base in (handles if bases is None else bases)}

    async def reports(self, *, is_fresh: bool = False) -> tuple[ReplicaReport, ...]:
        """Return every replica, those that start and those that do not answer too; at most a second old."""
        async with self._lock:
            if is_fresh or self._clock() - self._asked_at > REPORTS_TTL_S:
                asked = asyncio.gather(*map(self._report, self._last))
                counts, replied = await asyncio.gather(self._counts(), asked)
                self._reports = tuple(
                    report
                    for base, replies in zip(self._last, replied, strict=True)
                    for report in self._complete(base, replies, counts.get(base, ReplicaCount(running=len(replies))))
                )
                self._asked_at = self._clock()
        return self._reports

    async def forget(self, model: str) -> tuple[str, ...]:
        """Have every replica forget an adapter once no request uses it; return those that held it."""
        asked = (self._ask(base, "forget_adapter", model, timeout_s=FORGET_TIMEOUT_S) for base in self._last)
        replies = [reply for replied in await asyncio.gather(*asked) for reply in replied]
        self._asked_at = float("-inf")
        for error in replies:
            if isinstance(error, Exception):
                log.warning("a replica could not be told to forget %s: %s", model, type(error).__name__)
        return tuple(reply for reply in replies if isinstance(reply, str))

    async def preload(self, spec: AdapterSpec, replicas: Sequence[str], *, token: HubToken | None) -> tuple[str, ...]:
        """Have some replicas fetch an adapter into memory; return those that hold it then.

        Raises:
            LoraplexError: none of them could, for this reason.
        """

        def is_enough(replies: Sequence[Any]) -> bool:
            # Replicas that are not addressed reply with None; if one of them hangs, the call does not wait for it.
            return sum(not isinstance(reply, TimeoutError | None) for reply in replies) >= len(replicas)

        arguments = (spec, tuple(replicas), token)
        replies = await self._ask(spec.base_id, "preload_adapter", *arguments, is_enough=is_enough)
        self._asked_at = float("-inf")
        holders = tuple(reply for reply in replies if isinstance(reply, str))
        # An error of ours arrives in Ray's wrapping.
        errors = (getattr(reply, "cause", reply) for reply in replies)
        if not holders:
            raise next((error for error in errors if isinstance(error, LoraplexError)), NotReady(spec.base_id))
        return holders

    async def _report(self, base: str) -> list[ReplicaReport]:
        replies = await self._ask(base, "report", timeout_s=self._answer_timeout_s)
        return [reply for reply in replies if isinstance(reply, ReplicaReport)]

    def _complete(self, base: str, replies: list[ReplicaReport], count: ReplicaCount) -> list[ReplicaReport]:
        """Add those that run and did not reply, as they were when they last did, and those that start."""
        replied = {report.id: report for report in replies}
        missing = [report for id_, report in self._last[base].items() if id_ not in replied]
        silent = [replace(report, state="SILENT") for report in missing[: max(0, count.running - len(replies))]]
        self._last[base] = replied | {report.id: report for report in silent}
        unheard = count.running - len(replies) - len(silent)
        nameless = [ReplicaReport(f"silent-{index + 1}", base, state="SILENT") for index in range(unheard)]
        new = [ReplicaReport(f"starting-{index + 1}", base, state="STARTING") for index in range(count.starting)]
        return [*sorted(replies, key=lambda report: report.id), *silent, *nameless, *new]

    async def _ask(
        self,
        base: str,
        method: str,
        *args: Any,
        timeout_s: float | None = None,
        is_enough: Callable[[Sequence[Any]], bool] = lambda _: True,
    ) -> list[Any]:
        """Return what each replica of a base replies, its error, or `TimeoutError` for one that is late.

        Without a time limit the late ones are waited for until the replies so far are enough.
        """
        response = self._handles[base].broadcast(method, *args)

        def replies() -> list[Any]:
            # In a thread: the asynchronous way returns nothing at all where one replica is late.
            return response.results(timeout_s=timeout_s or self._answer_timeout_s, return_exceptions=True)

        try:
            while True:
                replied = await run_blocking(replies)
                is_late = any(isinstance(reply, TimeoutError) for reply in replied)
                if timeout_s is not None or not is_late or is_enough(replied):
                    return replied
        except (RayError, RayServeException, TimeoutError) as error:
            log.debug("no replica of %s was reached: %s", base, type(error).__name__)
            return []
