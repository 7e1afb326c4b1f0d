"""A process that stands still is ended by the small one beside it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import psutil
import pytest

SILENCE_S = 1.0
GUARDED = """
import asyncio, os, signal, sys, time
from serve_app.deployments.guardian import Guardian

async def live():
    print(Guardian(float(sys.argv[1])).pid, flush=True)
    await asyncio.sleep(0.01)
    match sys.argv[2]:
        case "stops": os.kill(os.getpid(), signal.SIGSTOP)
        case "blocks": time.sleep(60)
        case "lives": await asyncio.sleep(3 * float(sys.argv[1]))

asyncio.run(live())
"""


def ended(how: str) -> tuple[int, psutil.Process, str]:
    """Run a guarded process; return its exit status, the process beside it, and what that one wrote."""
    command = [sys.executable, "-c", GUARDED, str(SILENCE_S), how]
    guarded = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert guarded.stdout is not None
    guardian = psutil.Process(int(guarded.stdout.readline()))
    _, errors = guarded.communicate(timeout=30)
    return guarded.returncode, guardian, errors


@pytest.mark.parametrize("how", ["stops", "blocks"])
def test_a_process_that_is_stopped_or_whose_event_loop_is_blocked_is_killed(how: str) -> None:
    status, guardian, errors = ended(how)
    assert status == -signal.SIGKILL
    assert "gave no sign of life for 1 s" in errors
    guardian.wait(10)


def test_a_process_that_lives_is_left_alone_and_its_guardian_ends_with_it() -> None:
    began = time.monotonic()
    status, guardian, errors = ended("lives")
    assert (status, errors) == (0, "")
    assert time.monotonic() - began >= 3 * SILENCE_S
    guardian.wait(10)
