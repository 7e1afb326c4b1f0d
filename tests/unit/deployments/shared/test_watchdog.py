"""A process that stands still is ended by the small one beside it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from dataclasses import dataclass

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


@dataclass
class Guarded:
    """A process with a watchdog: when it was started, and the process."""

    began: float
    process: subprocess.Popen[str]

    def ended(self) -> tuple[int, int, str]:
        """Return its exit status, the process id beside it, and what that one wrote."""
        assert self.process.stdout is not None
        watchdog = int(self.process.stdout.readline())
        _, errors = self.process.communicate(timeout=WAIT_S)
        return self.process.returncode, watchdog, errors


@pytest.fixture(scope="module")
def guarded() -> dict[str, Guarded]:
    """Processes whose silences pass together."""
    return {
        how: Guarded(
            time.monotonic(),
            subprocess.Popen(
                [sys.executable, "-c", GUARDED, str(silence_s), how],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            ),
        )
        for how, silence_s in SILENCES_S.items()
    }  # fmt: skip


@pytest.mark.parametrize("how", ["stops", "blocks"])
def test_a_process_that_is_stopped_or_whose_event_loop_is_blocked_is_killed(
    guarded: dict[str, Guarded], how: str
) -> None:
    status, watchdog, errors = guarded[how].ended()
    assert status == -signal.SIGKILL
    assert "gave no sign of life for 3 s" in errors
    until(lambda: has_ended(watchdog), "the end of the watchdog")


def test_a_process_that_lives_is_left_alone_and_its_guardian_ends_with_it(
    guarded: dict[str, Guarded],
) -> None:
    status, watchdog, errors = guarded["lives"].ended()
    assert (status, errors) == (0, "")
    assert time.monotonic() - guarded["lives"].began >= 1.5 * LONG_SILENCE_S
    until(lambda: has_ended(watchdog), "the end of the watchdog")
