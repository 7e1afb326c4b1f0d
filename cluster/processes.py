"""Reading of processes that may end meanwhile."""

from __future__ import annotations

import psutil


def command_line(process: psutil.Process) -> str:
    """Return what a process was started with, or what it has called itself since; nothing where it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
