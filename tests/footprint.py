"""What the processes of a cluster take: memory and processor time, by what each process is.

Reads `/proc`, and so runs on Linux alone. Memory is what a process has to itself or maps from files, without what it
shares with others through Ray's object store.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

# Of the command lines that Ray gives its processes; the first that fits names the process.
KINDS = (
    (r"ServeReplica:[^:]*:([A-Za-z0-9_-]+)", r"\1"),
    (r"ray::ProxyActor", "proxy"),
    (r"ray::ServeController", "controller"),
    (r"gcs_server", "GCS"),
    (r"raylet/raylet", "raylet"),
    (r"runtime_env/agent", "runtime-env agent"),
    (r"dashboard/agent", "dashboard agent"),
    (r"dashboard/dashboard", "dashboard"),
    (r"log_monitor", "log monitor"),
    (r"autoscaler/_private/monitor|monitor\.py", "autoscaler monitor"),
    (r"ray::IDLE", "idle worker"),
    (r"api\.pictures\.child", "pictures"),
    (r"engine\.admission\.child", "admission"),
)


@dataclass(frozen=True, slots=True)
class Footprint:
    """One process at one moment."""

    memory_bytes: int
    shared_bytes: int
    cpu_s: float


def ours(root: psutil.Process | None = None) -> Iterator[tuple[str, psutil.Process]]:
    """Every process below one, by default this, with what it is; a replica bears its deployment's name."""
    for process in (root or psutil.Process()).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            kind = _kind(" ".join(process.cmdline()))
            if kind is not None:
                yield kind, process


def footprints(root: psutil.Process | None = None) -> dict[str, Footprint]:
    """The footprint of each process that is known, by `kind/pid`."""
    found: dict[str, Footprint] = {}
    for kind, process in ours(root):
        with contextlib.suppress(psutil.Error, OSError, ValueError):
            times = process.cpu_times()
            found[f"{kind}/{process.pid}"] = Footprint(*_memory(process.pid), times.user + times.system)
    return found


def _memory(pid: int) -> tuple[int, int]:
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    anonymous, file, shared = (int(status[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile", "RssShmem"))
    return anonymous + file, shared


def _kind(command: str) -> str | None:
    for pattern, name in KINDS:
        if (found := re.search(pattern, command)) is not None:
            return found.expand(name)
    return None


def kilobytes_of(file: Path | None = None) -> dict[str, int]:
    """Return what the kernel says of this process's memory, or of its pages of one file."""
    is_wanted, found = file is None, dict[str, int]()
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, value = line.partition(":")
        if not value.endswith(" kB"):  # a mapping's first line, or one of its flags, which come last
            is_wanted = file is None or line.endswith(str(file))
        elif is_wanted:
            found[name] = found.get(name, 0) + int(value.split()[0])
    return found
