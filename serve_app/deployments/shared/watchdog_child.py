"""Ends the process that started it once that is silent for too long, and ends with it.

Run by its path and without site packages, so that it stays small: it imports nothing of the service.
"""

from __future__ import annotations

import os
import select
import signal
import sys

STDIN = 0


def watch(parent: int, timeout_s: float) -> None:
    """Read the parent's signs of life from standard input until it ends or has given none for `timeout_s`.

    The silence is counted in two halves: when a whole machine was held, the second gives the parent time to speak.
    """
    is_silent = False
    while True:
        if select.select([STDIN], [], [], timeout_s / 2)[0]:
            if not os.read(STDIN, 4096):
                return
            is_silent = False
        elif is_silent:
            break
        else:
            is_silent = True
    if os.getppid() == parent:
        sys.stderr.write(f"process {parent} gave no sign of life for {timeout_s:g} s: it is ended, to be replaced\n")
        os.kill(parent, signal.SIGKILL)


if __name__ == "__main__":
    watch(os.getppid(), float(sys.argv[1]))
