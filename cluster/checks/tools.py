"""Programs that others wrote: found beside this Python or on the PATH, run, and asked for one line a fault."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path


class ToolMissing(Exception):
    """A program that a check needs is not installed; the text says how it comes."""


def find(name: str, how: str) -> str:
    """Return the path of a program.

    Raises:
        ToolMissing: it is neither in this virtual environment nor on the PATH.
    """
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise ToolMissing(f"{name} is not installed: {how}")
    return found


def faults_of(command: list[str], cwd: Path) -> list[str]:
    """Return what a program complained about, nothing if it was content."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240, check=False)
    if done.returncode == 0:
        return []
    said = [" ".join(line.split()) for line in (done.stdout + done.stderr).splitlines()]
    faults = [line for line in said if line and "SUCCESS" not in line and not line.startswith("Checking")]
    return faults or [f"{Path(command[0]).name} failed with exit code {done.returncode}"]
