"""One child of admission: its start, the words exchanged with it (`child`), its time limits, its end.

Owns the process and the thread that speaks to it. Must not know what is asked.
"""

from __future__ import annotations

import json
import logging
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from serve_app.environment import child_environment

log = logging.getLogger(__name__)

START_LIMIT_S = 180.0
TICK_S = 0.1
BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from serve_app.engine.admission.child import main; main()"
)
DISK_FULL = "DiskFull"  # the one answer that is not about the file


class AdmissionTooSlow(Exception):
    """The request took longer than the lane's patience while others waited behind it."""


class ChildDied(Exception):
    """The child ended over the request."""


class ChildWorker:
    """A child that answers one request at a time, in the order asked.

    Invariants: after a request that was not answered there is no child, and the next request starts one.
    """

    def __init__(self, setup: Mapping[str, Any], *, patience_s: float, is_lasting: bool) -> None:
        """Start no child yet; one that `is_lasting` serves all requests, any other a single one."""
        self._setup = setup
        self._patience_s = patience_s
        self._is_lasting = is_lasting
        self._child: Child | None = None
        self._reading: str | None = None
        self._is_closed = False
        self._asked = 0
        self._lock = threading.Lock()
        # One thread does all the talking: it keeps the order, and as the child's parent it must outlive the child.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="admission")

    @property
    def pid(self) -> int | None:
        """The child's process id; None between children."""
        return None if self._child is None else self._child.pid

    @property
    def reading(self) -> str | None:
        """The name in the request that the child has been given and not yet answered."""
        return self._reading

    def start(self) -> None:
        """Start the child before anything is asked."""
        self._thread.submit(self._ready_child)

    def ask(self, request: Mapping[str, Any], limit_s: float) -> Future[dict[str, Any]]:
        """Queue a request; the future has the child's answer.

        Its errors: TimeoutError after `limit_s`, Overtaken, ChildDied. A request that is cancelled before its turn is
        never begun.
        """
        future = self._thread.submit(self._answer, request, limit_s)
        self._count(1)
        future.add_done_callback(lambda _: self._count(-1))
        return future

    def close(self) -> None:
        """End the child, even while it reads a file."""
        self._is_closed = True
        if self._child is not None:
            self._child.kill()
        self._thread.shutdown(wait=True, cancel_futures=True)
        if self._child is not None:
            self._child.kill()

    def _count(self, change: int) -> None:
        with self._lock:
            self._asked += change

    def _answer(self, request: Mapping[str, Any], limit_s: float) -> dict[str, Any]:
        child = self._ready_child()
        is_answered = False
        try:
            child.send(request)
            self._reading = str(request["name"])
            answer = self._wait(child, limit_s)
            is_answered = True
            return answer
        except EOFError:
            raise ChildDied from None
        finally:
            self._reading = None
            if not (is_answered and self._is_lasting):
                self._end_child()

    def _wait(self, child: Child, limit_s: float) -> dict[str, Any]:
        started = time.monotonic()
        deadline = started + limit_s
        while True:
            try:
                return child.receive(min(TICK_S, max(0.0, deadline - time.monotonic())))
            except TimeoutError:
                now = time.monotonic()
                if now >= deadline:
                    raise
                if now - started > self._patience_s and self._asked > 1:
                    raise AdmissionTooSlow from None

    def _ready_child(self) -> Child:
        if self._child is not None and self._child.is_alive:
            return self._child
        if not self._is_closed:
            self._child = Child()
        # Asked again after the start: `close` ends the child that it sees, or is seen here.
        if self._child is None or self._is_closed:
            self._end_child()
            raise RuntimeError("the admission process is closed")
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


class Child:
    """The process and its two pipes; one line of JSON each way."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", BOOT, json.dumps(sys.path)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env=child_environment()
        )
        self._received = b""

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def send(self, message: Mapping[str, Any]) -> None:
        """Give it a line; if it has ended, `receive` says so."""
        assert self._process.stdin is not None
        line = memoryview(json.dumps(message).encode() + b"\n")
        try:
            while line:
                line = line[self._process.stdin.write(line) :]
        except BrokenPipeError:
            log.warning("the admission process ended by itself")

    def receive(self, limit_s: float) -> dict[str, Any]:
        """Return its next answer.

        Raises:
            TimeoutError: none came in time; it may come later.
            EOFError: it ended.
        """
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
        answer: dict[str, Any] = json.loads(line)
        return answer

    def kill(self) -> None:
        """End it at once, even while it reads a file."""
        self._process.kill()
        self._process.wait()
