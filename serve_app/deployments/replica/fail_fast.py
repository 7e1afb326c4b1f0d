"""How a replica ends that will answer nothing more: at once, so that its requests go elsewhere and it is replaced.

Serve takes a replica's word for its health only when it has said three times that it is ill, and would then wait for
requests that never end; a process that has ended is replaced at the next look. Must not know Ray or what is wrong.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from serve_app.deployments.replica.health import Ailment, ailment

if TYPE_CHECKING:
    from serve_app.engine.worker.worker import EngineWorker

log = logging.getLogger(__name__)

# So long the answers have to reach those whose requests were given up.
LEAVE_AFTER_S = 0.2


def end_process() -> None:
    """End this process as a kill would: a thread that hangs in a driver lets no other way out."""
    os._exit(1)


class Leaving:
    """Watches one worker. Once it can answer nothing more, its jobs are given up and the process ends.

    Used on one event loop.
    """

    def __init__(
        self,
        worker: EngineWorker,
        base_id: str,
        *,
        stall_after_s: float,
        end: Callable[[], None] = end_process,
    ) -> None:
        """`end` is called once, `LEAVE_AFTER_S` after a final ailment was found."""
        self._worker = worker
        self._base_id = base_id
        self._stall_after_s = stall_after_s
        self._end = end
        self._found: Ailment | None = None
        self._is_stopped = False

    def look(self) -> Ailment | None:
        """Return what is wrong for good with the worker; begin to leave where it will answer nothing more."""
        if self._found is not None or self._is_stopped:
            return self._found
        found = ailment(self._worker.snapshot(), self._base_id, stall_after_s=self._stall_after_s)
        if found is not None and found.ends_process:
            self._found = found
            log.critical("this replica ends, to be replaced: %s", found.reason)
            self._worker.abandon(found.why)
            asyncio.get_running_loop().call_later(LEAVE_AFTER_S, self._end)
        return found

    @property
    def has_failed(self) -> bool:
        """Whether the worker answers nothing more; looks."""
        found = self.look()
        return found is not None and not found.answers

    def stop(self) -> None:
        """Find nothing from now on: the worker is closed in good order."""
        self._is_stopped = True

    async def admit(self) -> None:
        """Return at once, but never where the process is about to end: its end is the answer that is tried again."""
        if self._found is not None:
            await asyncio.Event().wait()
