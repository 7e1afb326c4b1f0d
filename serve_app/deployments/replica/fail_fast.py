"""How a replica ends that will answer nothing more: at once, so that its requests go elsewhere and it is replaced.

Ray Serve replaces a replica only after three failed health checks, and then waits for its running requests, which may
never end. A replica whose process exits is replaced at once. Must not know Ray or what is wrong.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from serve_app.deployments.replica.health import HealthProblem, diagnose

if TYPE_CHECKING:
    from serve_app.engine.worker.worker import EngineWorker

log = logging.getLogger(__name__)

# So long the answers have to reach those whose requests were given up.
LEAVE_AFTER_S = 0.2


def end_process() -> None:
    """End this process as a kill would: a thread that hangs in a driver lets no other way out."""
    os._exit(1)


class FailFast:
    """Watches one worker. Once it can answer nothing more, its jobs are given up and the process ends.

    Used on one event loop.
    """

    def __init__(
        self,
        worker: EngineWorker,
        base_id: str,
        *,
        stall_timeout_s: float,
        end: Callable[[], None] = end_process,
    ) -> None:
        """`end` is called once, `LEAVE_AFTER_S` after a final ailment was found."""
        self._worker = worker
        self._base_id = base_id
        self._stall_after_s = stall_timeout_s
        self._end = end
        self._found: HealthProblem | None = None
        self._is_stopped = False

    def check_and_exit(self) -> HealthProblem | None:
        """Return the permanent problem of the worker, if any; on a fatal one fail all jobs and end the process soon."""
        if self._found is not None or self._is_stopped:
            return self._found
        found = self._diagnose()
        if found is not None and found.is_fatal:
            self._found = found
            log.critical("this replica ends, to be replaced: %s", found.message)
            self._worker.fail_all(found.reason)
            asyncio.get_running_loop().call_later(LEAVE_AFTER_S, self._end)
        return found

    def check_failed(self) -> bool:
        """Return whether the worker can answer nothing more; changes nothing."""
        found = self._found or self._diagnose()
        return found is not None and not found.can_serve

    def _diagnose(self) -> HealthProblem | None:
        return diagnose(self._worker.snapshot(), self._base_id, stall_timeout_s=self._stall_after_s)

    def stop(self) -> None:
        """Find nothing from now on: the worker is closed in good order."""
        self._is_stopped = True

    async def block_if_exiting(self) -> None:
        """Return immediately, or block for ever if the process is about to exit.

        The caller then sees the process die and retries the request on another replica.
        """
        if self._found is not None:
            await asyncio.Event().wait()
