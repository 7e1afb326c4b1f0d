"""A process that stands still is ended by the small one beside it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from tests.faults.breaking import has_ended, until

SILENCE_S = 3.0
# So much longer than a busy machine keeps a process waiting.
LONG_SILENCE_S = 6.0
WAIT_S = 120.0
GUARDED = """
import asyncio, os, signal, sys, time
from serve_app.deployments.shared.watchdog import Watchdog

async def live():
    print(Watchdog(float(sys.argv[1])).pid, flush=True)
    await asyncio.sleep(0.01)
    match sys.argv[2]:
        case "stops": os.kill(os.getpid(), signal.SIGSTOP)
        case "blocks": time.sleep(600)
        case "lives": await asyncio.sleep(1.5 * float(sys.argv[1]))

asyncio.run(live())
"""


def ended(how: str, timeout_s: float) -> tuple[int, int, str]:
    """Run a guarded process; return its exit status, the process id beside it, and what that one wrote."""
    command = [sys.executable, "-c", GUARDED, str(timeout_s), how]
    guarded = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert guarded.stdout is not None
    watchdog = int(guarded.stdout.readline())
    _, errors = guarded.communicate(timeout=WAIT_S)
    return guarded.returncode, watchdog, errors


@pytest.mark.parametrize("how", ["stops", "blocks"])
def test_a_process_that_is_stopped_or_whose_event_loop_is_blocked_is_killed(how: str) -> None:
    status, watchdog, errors = ended(how, SILENCE_S)
    assert status == -signal.SIGKILL
    assert "gave no sign of life for 3 s" in errors
    until(lambda: has_ended(watchdog), "the end of the watchdog")


def test_a_process_that_lives_is_left_alone_and_its_guardian_ends_with_it() -> None:
    began = time.monotonic()
    status, watchdog, errors = ended("lives", LONG_SILENCE_S)
    assert (status, errors) == (0, "")
    assert time.monotonic() - began >= 1.5 * LONG_SILENCE_S
    until(lambda: has_ended(watchdog), "the end of the watchdog")
