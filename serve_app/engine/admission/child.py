"""The child's side of admission: reads requests, answers each with nothing or with a refusal.

Owns the process it runs in: one thread of torch, low priority, no output but its replies. Started by `admission`.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from serve_app.engine.adapters.canonical import write_canonical
from serve_app.engine.adapters.parser import parse_adapter
from serve_app.engine.adapters.safetensors_file import FilePart
from serve_app.engine.admission.lane import DISK_FULL
from serve_app.engine.base.manifest import BaseManifest
from serve_app.file_locks import is_disk_full
from serve_app.refusals import RefusedAdapter
from serve_app.settings import AdapterLimits

log = logging.getLogger(__name__)

# A generation that must share its core with admission keeps three quarters of it (the scheduler's weights are 1024 and
# 335). Nicer still, and files would run into their time limit wherever every core is busy.
NICENESS = 5
PR_SET_PDEATHSIG = 1  # linux/prctl.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h of the GNU C library
KEPT_BYTES = 256 * 1024**2
LARGEST_KEPT_BYTES = 32 * 1024**2  # the most that library allows


def main() -> None:
    """Serve requests from standard input until it closes."""
    replies = _private_output()
    setup = json.loads(sys.stdin.readline())
    _settle(setup["parent"])
    manifest = BaseManifest.from_json(setup["manifest"])
    limits = AdapterLimits.model_validate(setup["limits"])
    _reply(replies, {})
    for line in sys.stdin:
        _reply(replies, _admit(json.loads(line), manifest, limits))


def _admit(request: dict[str, Any], manifest: BaseManifest, limits: AdapterLimits) -> dict[str, Any]:
    try:
        embeddings = Path(request["embeddings"]) if "embeddings" in request else None
        sources = [FilePart(Path(path), component) for path, component in request["sources"]]
        adapter = parse_adapter(sources, request["name"], manifest, limits, embeddings, request.get("settings"))
        write_canonical(adapter, Path(request["target"]))
    except RefusedAdapter as refusal:
        return {"error": type(refusal).__name__, "reason": refusal.reason}
    except OSError as error:
        log.warning("admission of %s failed on the disk: %s", request["name"], error.strerror)
        return {"error": DISK_FULL if is_disk_full(error) else "MalformedFile", "reason": "its file could not be read"}
    except Exception:  # the boundary of this process: the parent gets an answer to every file
        log.exception("admission of %s failed", request["name"])
        return {"error": "MalformedFile", "reason": "its file could not be read"}
    return {}


def _settle(parent: int) -> None:
    """Take one thread and a low priority, leave Ctrl-C to the parent, and die when the parent dies."""
    torch.set_num_threads(1)
    os.nice(NICENESS)
    if hasattr(os, "SCHED_BATCH"):  # it takes a core when one is free, and preempts no process when it wakes
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        library.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if hasattr(library, "mallopt"):  # keep the memory of one file's tensors for the next one's
            library.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES)
            library.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
    if os.getppid() != parent:
        sys.exit(1)


def _private_output() -> int:
    """Keep standard output for the replies alone; output of libraries goes to standard error."""
    replies = os.dup(1)
    os.dup2(2, 1)
    return replies


def _reply(replies: int, message: dict[str, Any]) -> None:
    os.write(replies, json.dumps(message).encode() + b"\n")
