"""Admission: adapter files that nobody vouches for are parsed and checked in a process of their own.

Owns the child process: its start, its time limit, its end, and the words exchanged with it (`admission_child`). A
file that hangs or kills the child costs that child alone. Must not parse files itself.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import select
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from serve_app import errors
from serve_app.config import AdapterLimits
from serve_app.engine.manifest import BaseManifest
from serve_app.errors import AdmissionTimedOut, MalformedFile, RefusedAdapter

log = logging.getLogger(__name__)

START_LIMIT_S = 180.0
BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from serve_app.engine.admission_child import main; main()"
)


class AdmissionProcess:
    """One long-lived child that turns adapter files into canonical ones, one at a time, in the order asked.

    Invariants: the child dies with this process, however this process dies; after a file that took too long or
    killed the child, the next file gets a new one. The child starts at construction, so that it is warm when the
    first file comes.
    """

    def __init__(self, manifest: BaseManifest, limits: AdapterLimits) -> None:
        self._limits = limits
        self._setup = {"manifest": manifest.to_json(), "limits": limits.model_dump(mode="json"), "parent": os.getpid()}
        self._child: _Child | None = None
        self._reading: str | None = None
        self._is_closed = False
        # One thread does all the talking: it keeps the order, and as the child's parent it must outlive the child.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="admission")
        self._thread.submit(self._ready_child)

    async def admit(self, source: Path, name: str, target: Path) -> None:
        """Check `source` against the base and write its canonical form to `target`, whole or not at all.

        Raises:
            AdmissionTimedOut: the check took longer than `limits.admission_timeout_s`.
            RefusedAdapter: one of its subclasses, as `read_adapter` raises them.
        """
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._thread, self._admit, source, name, target)

    @property
    def pid(self) -> int | None:
        """The child's process id; None between children."""
        return None if self._child is None else self._child.pid

    @property
    def reading(self) -> str | None:
        """The adapter whose file the child has been given and not yet answered for."""
        return self._reading

    def close(self) -> None:
        """End the child and whatever it is reading."""
        self._is_closed = True
        if self._child is not None:
            self._child.kill()
        self._thread.shutdown(wait=True, cancel_futures=True)
        if self._child is not None:
            self._child.kill()

    def _admit(self, source: Path, name: str, target: Path) -> None:
        child = self._ready_child()
        limit_s = self._limits.admission_timeout_s
        child.send({"source": str(source), "name": name, "target": str(target)})
        self._reading = name
        try:
            answer = child.receive(limit_s)
        except TimeoutError:
            self._end_child()
            raise AdmissionTimedOut(name, f"checking its file took longer than {limit_s:g} s") from None
        except EOFError:
            self._end_child()
            raise MalformedFile(name, "its file could not be read: the process that read it died") from None
        finally:
            self._reading = None
        if answer != {}:
            raise _refusal(answer, name)

    def _ready_child(self) -> _Child:
        if self._is_closed:
            raise RuntimeError("the admission process is closed")
        if self._child is not None and self._child.is_alive:
            return self._child
        self._child = _Child()
        self._child.send(self._setup)
        try:
            self._child.receive(START_LIMIT_S)
        except (TimeoutError, EOFError) as error:
            self._end_child()
            raise RuntimeError("the admission process did not start") from error
        return self._child

    def _end_child(self) -> None:
        if self._child is not None:
            self._child.kill()
        self._child = None


class _Child:
    """The process and its two pipes; one line of JSON each way."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", BOOT, json.dumps(sys.path)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        self._received = b""

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        line = memoryview(json.dumps(message).encode() + b"\n")
        try:
            while line:
                line = line[self._process.stdin.write(line) :]
        except BrokenPipeError:
            log.warning("the admission process ended by itself")  # receive says so to the asker

    def receive(self, limit_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        deadline = time.monotonic() + limit_s
        poll = select.poll()
        poll.register(self._process.stdout, select.POLLIN | select.POLLHUP)
        while b"\n" not in self._received:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TimeoutError
            chunk = self._process.stdout.read(65536)
            if not chunk:
                raise EOFError
            self._received += chunk
        line, _, self._received = self._received.partition(b"\n")
        return json.loads(line)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def _refusal(answer: dict[str, Any], name: str) -> RefusedAdapter:
    """Rebuild the child's error; only refusals are, by name, and only from text."""
    kind = getattr(errors, str(answer.get("error")), None)
    if isinstance(kind, type) and issubclass(kind, RefusedAdapter):
        return kind(name, str(answer.get("reason")))
    return MalformedFile(name, "its file could not be read")
