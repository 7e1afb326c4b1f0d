"""What all replicas hold and do, asked of all of them at once: the ingress's side of residency.

Owns the asking: under a time limit, shared by all who want to know, and remembered for a moment. Also tells replicas
to forget or to fetch an adapter.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from serve_app.catalog.replica_report import ReplicaReport
from serve_app.core import AdapterSpec, HubToken
from serve_app.errors import LoraplexError, NotReady

log = logging.getLogger(__name__)

REPORTS_TTL_S = 1.0
ANSWER_TIMEOUT_S = 1.0
COUNTS_TIMEOUT_S = 1.0
FORGET_TIMEOUT_S = 5.0


class ReplicaBroadcast:
    """The replicas of every base of one application."""

    def __init__(
        self,
        handles: Mapping[str, DeploymentHandle],
        counts: Callable[[], Mapping[str, ReplicaCount]],
        *,
        clock: Callable[[], float],
        answer_timeout_s: float = ANSWER_TIMEOUT_S,
    ) -> None:
        """Ask nobody yet.

        Args:
            handles: The way to the replicas of each base.
            counts: How many there are of each base; may block, and is called in a thread.
            clock: Monotonic seconds.
            answer_timeout_s: How long a replica has to say what it does.
        """
        self._handles = handles
        self._counts_of = counts
        self._clock = clock
        self._answer_timeout_s = answer_timeout_s
        self._lock = asyncio.Lock()
        self._reports: tuple[ReplicaReport, ...] = ()
        self._asked_at = float("-inf")
        self._last: dict[str, dict[str, ReplicaReport]] = {base: {} for base in handles}
        self._counted: Mapping[str, ReplicaCount] = {}

    async def reports(self, *, is_fresh: bool = False) -> tuple[ReplicaReport, ...]:
        """Return every replica, those that start and those that do not answer too; at most a second old."""
        async with self._lock:
            if is_fresh or self._clock() - self._asked_at > REPORTS_TTL_S:
                counts = asyncio.ensure_future(self._counts())
                asked = await asyncio.gather(*(self._report(base) for base in self._handles))
                self._counted = await counts
                self._reports = tuple(
                    report
                    for base, answers in zip(self._handles, asked, strict=True)
                    for report in self._complete(
                        base, answers, self._counted.get(base, ReplicaCount(running=len(answers)))
                    )
                )
                self._asked_at = self._clock()
        return self._reports

    async def forget(self, model: str) -> tuple[str, ...]:
        """Have every replica forget an adapter once no request uses it; return those that held it."""
        asked = (self._ask(base, "forget_adapter", model, timeout_s=FORGET_TIMEOUT_S) for base in self._handles)
        answers = [answer for answered in await asyncio.gather(*asked) for answer in answered]
        self._asked_at = float("-inf")
        for error in answers:
            if isinstance(error, BaseException):
                log.warning("a replica could not be told to forget %s: %s", model, type(error).__name__)
        return tuple(answer for answer in answers if isinstance(answer, str))

    async def preload(self, spec: AdapterSpec, replicas: Sequence[str], *, token: HubToken | None) -> tuple[str, ...]:
        """Have some replicas fetch an adapter into memory; return those that hold it then.

        Raises:
            LoraplexError: none of them could, for this reason.
        """

        def have_told(answers: Sequence[Any]) -> bool:
            # Those that are not meant answer with nothing, and one of them that hangs holds nobody up.
            return sum(answer is not None for answer in answers) >= len(replicas)

        arguments = (spec, tuple(replicas), token)
        answers = await self._ask(spec.base_id, "preload_adapter", *arguments, timeout_s=None, is_enough=have_told)
        self._asked_at = float("-inf")
        holders = tuple(answer for answer in answers if isinstance(answer, str))
        errors = [error for error in answers if isinstance(error, BaseException)]
        if not holders:
            raise _own(errors) or NotReady(spec.base_id)
        return holders

    async def _report(self, base: str) -> list[ReplicaReport]:
        answers = await self._ask(base, "report", timeout_s=self._answer_timeout_s)
        return [answer for answer in answers if isinstance(answer, ReplicaReport)]

    def _complete(self, base: str, answers: list[ReplicaReport], count: ReplicaCount) -> list[ReplicaReport]:
        """Add those that run and did not answer, as they were when they last did, and those that start."""
        answered = {report.id: report for report in answers}
        missing = [report for id_, report in self._last[base].items() if id_ not in answered]
        silent = [replace(report, state="SILENT") for report in missing[: max(0, count.running - len(answers))]]
        self._last[base] = answered | {report.id: report for report in silent}
        unheard = count.running - len(answers) - len(silent)
        nameless = [ReplicaReport(f"silent-{index + 1}", base, state="SILENT") for index in range(unheard)]
        new = [ReplicaReport(f"starting-{index + 1}", base, state="STARTING") for index in range(count.starting)]
        return [*sorted(answers, key=lambda report: report.id), *silent, *nameless, *new]

    async def _ask(
        self,
        base: str,
        method: str,
        *args: Any,
        timeout_s: float | None,
        is_enough: Callable[[Sequence[Any]], bool] = lambda _: False,
    ) -> list[Any]:
        """Return what each replica of a base answers, or its error; those out of time are left out.

        Once the answers so far are enough, nobody waits for the others.
        """
        try:
            broadcast: Any = self._handles[base].broadcast(method, *args)
            # Its public way to the answers gives none of them where one is late.
            results = await asyncio.wait_for(broadcast._fetch_replica_results_async(), timeout_s or FORGET_TIMEOUT_S)
        except (RayError, RayServeException, TimeoutError) as error:
            log.debug("no replica of %s was reached: %s", base, type(error).__name__)
            return []
        if not results:
            return []
        waits = [asyncio.ensure_future(result.get_async()) for result in results]
        answers: list[Any] = []
        waiting = set(waits)
        now = asyncio.get_running_loop().time
        ends_at = None if timeout_s is None else now() + timeout_s
        try:
            while waiting and not is_enough(answers):
                left_s = None if ends_at is None else max(0.0, ends_at - now())
                done, waiting = await asyncio.wait(waiting, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
                if not done:
                    break
                answers += [
                    wait.exception() or wait.result() for wait in waits if wait in done and not wait.cancelled()
                ]
        finally:
            for result, wait in zip(results, waits, strict=True):
                if not wait.done():
                    result.cancel()
                    wait.cancel()
        return answers

    async def _counts(self) -> Mapping[str, ReplicaCount]:
        """Return how many replicas of each base there are, or were when Serve last said so in time."""
        try:
            return await asyncio.wait_for(asyncio.to_thread(self._counts_of), COUNTS_TIMEOUT_S)
        except (RayError, RayServeException, TimeoutError):
            return self._counted


def _own(errors: Sequence[BaseException]) -> LoraplexError | None:
    """Return the first error that is ours, out of Ray's wrapping."""
    causes = (getattr(error, "cause", error) for error in errors)
    return next((cause for cause in causes if isinstance(cause, LoraplexError)), None)


_UNUSABLE = re.compile(r"BaseUnusable: .+? cannot be served: (.+)")
# Serve types its states as an enumeration, and sends them as text.
RUNNING: Any = "RUNNING"
STARTING: Any = "STARTING"


@dataclass(frozen=True, slots=True)
class ReplicaCount:
    """How many replicas of one deployment run and how many start; `failure` says why none runs, where that is known."""

    running: int = 0
    starting: int = 0
    failure: str | None = None


def replica_counts(app_name: str) -> Mapping[str, ReplicaCount]:
    """Return the counts of an application by deployment; none where Serve does not know it. Blocks."""
    application = serve.status().applications.get(app_name)
    if application is None:
        return {}
    return {name: _count(overview) for name, overview in application.deployments.items()}


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
