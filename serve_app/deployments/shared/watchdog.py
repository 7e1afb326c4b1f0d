"""A small process beside each replica, which ends it where it stands still.

Serve notices a replica that answers no health check, and asks its process to end. One that is stopped, or held by the
kernel, does not hear that: it would stay, and with it every request that it has. Must not know Ray.
"""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from pathlib import Path

from serve_app.config import IngressSettings
from serve_app.environment import child_environment
from serve_app.settings import ReplicaSettings

log = logging.getLogger(__name__)

HEARTBEATS_PER_TIMEOUT = 10
# So many in a row, and Serve replaces a replica.
FAILED_CHECKS = 3
CHILD = Path(__file__).with_name("watchdog_child.py")


class Watchdog:
    """Tells its process, from the event loop on which it is made, that this one lives; there it is used alone."""

    def __init__(self, timeout_s: float) -> None:
        """Start it; after `timeout_s` without a turn of the event loop this process is killed."""
        self._pause_s = timeout_s / HEARTBEATS_PER_TIMEOUT
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", CHILD, str(timeout_s)],
            stdin=subprocess.PIPE,
            env=child_environment(),
            # Signals from a terminal to all of its processes must not reach this one.
            start_new_session=True,
            bufsize=0,
        )
        self._beating = asyncio.get_running_loop().create_task(self._beat(), name="watchdog")

    @property
    def pid(self) -> int:
        """The process that watches."""
        return self._process.pid

    async def _beat(self) -> None:
        assert self._process.stdin is not None
        while True:
            try:
                self._process.stdin.write(b".")
            except OSError:
                log.warning("the process that watches over this one has ended; nobody does now")
                return
            await asyncio.sleep(self._pause_s)


def start_watchdog(checked: IngressSettings | ReplicaSettings) -> Watchdog:
    """Start the watchdog of this process, as patient as Serve is with failing health checks."""
    return Watchdog(FAILED_CHECKS * (checked.health_check_period_s + checked.health_check_timeout_s))
