"""A process that stands still is ended by the small one beside it."""

from __future__ import annotations

import signal
import subprocess
import sys
from subprocess import PIPE

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


SILENCES_S = {"stops": SILENCE_S, "blocks": SILENCE_S, "lives": LONG_SILENCE_S}


@pytest.fixture(scope="module")
def guarded() -> dict[str, subprocess.Popen[str]]:
    """Guarded processes, whose silences pass together."""
    return {
        how: subprocess.Popen([sys.executable, "-c", GUARDED, str(silence_s), how], stdout=PIPE, stderr=PIPE, text=True)
        for how, silence_s in SILENCES_S.items()
    }


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Return its exit status, and what the process beside it wrote, once that one has ended too."""
    assert process.stdout is not None
    watchdog = int(process.stdout.readline())
    _, errors = process.communicate(timeout=WAIT_S)
    until(lambda: has_ended(watchdog), "the end of the watchdog")
    return process.returncode, errors


@pytest.mark.parametrize("how", ["stops", "blocks"])
def test_a_process_that_is_stopped_or_whose_event_loop_is_blocked_is_killed(
    guarded: dict[str, subprocess.Popen[str]], how: str
) -> None:
    status, errors = ended(guarded[how])
    assert status == -signal.SIGKILL
    assert "gave no sign of life for 3 s" in errors


def test_a_process_that_lives_is_left_alone_and_its_guardian_ends_with_it(
    guarded: dict[str, subprocess.Popen[str]],
) -> None:
    assert ended(guarded["lives"]) == (0, "")
