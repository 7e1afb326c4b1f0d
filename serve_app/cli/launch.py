"""`serve run` as a child process: start it, wait for it, and stop it with all its processes.

Owns the life of the local service behind `loraplex serve`. Must not know what is served.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil

from serve_app.environment import launch_environment

POLL_S = 1.0
STOP_TIMEOUT_S = 60.0


class StartFailed(Exception):
    """The service did not start; the text says why and what to do."""


class _Stopped(BaseException):
    """A signal requested the end."""


class ServeProcess:
    """One `serve run` of a file. When `run` returns, all processes that it started have ended."""

    def __init__(self, config: Path, *, url: str, address: str = "local", is_log_on_stderr: bool = False) -> None:
        self._config = config
        self._url = url
        self._address = address
        self._is_log_on_stderr = is_log_on_stderr

    def run(self, *, ready_timeout_s: float, on_ready: Callable[[], None]) -> None:
        """Start, call `on_ready` when requests are answered, and wait for a signal or the child's end.

        Raises:
            StartFailed: the port is taken, the child ended early, or it was not ready in time.
        """
        self._check_port()
        with _signals_raise(), self._child() as child:
            try:
                self._wait_until_ready(child, ready_timeout_s)
                on_ready()
                if child.wait() != 0:
                    raise StartFailed(f"serve run ended with exit code {child.returncode}; its log is above")
            except _Stopped:
                return

    def _check_port(self) -> None:
        parts = urlsplit(self._url)
        with contextlib.closing(socket.socket()) as probe:
            if probe.connect_ex((parts.hostname or "127.0.0.1", parts.port or 80)) == 0:
                raise StartFailed(
                    f"port {parts.port} is already in use; stop what listens there or change http_options.port"
                )

    @contextlib.contextmanager
    def _child(self) -> Iterator[subprocess.Popen[bytes]]:
        command = [
            sys.executable,
            "-m",
            "ray.serve.scripts",
            "run",
            str(self._config),
            "--address",
            self._address,
        ]
        # A session of its own: a terminal's Ctrl-C reaches only us, and we take the service down in order.
        stdout = sys.stderr if self._is_log_on_stderr else None
        child = subprocess.Popen(command, env=launch_environment(), start_new_session=True, stdout=stdout)
        try:
            yield child
        finally:
            _take_down(child)

    def _wait_until_ready(self, child: subprocess.Popen[bytes], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        with httpx.Client(timeout=5.0, trust_env=False) as client:
            while time.monotonic() < deadline:
                if child.poll() is not None:
                    raise StartFailed(f"serve run ended with exit code {child.returncode}; its log is above")
                with contextlib.suppress(httpx.HTTPError):
                    if client.get(f"{self._url}/health").status_code == httpx.codes.OK:
                        return
                time.sleep(POLL_S)
        raise StartFailed(f"not ready after {timeout_s:g} s; the log above says what it waits for")


def _take_down(child: subprocess.Popen[bytes]) -> None:
    """Interrupt the child, give it time to shut down, then kill the remaining processes of its tree."""
    tree = _tree(child)
    if child.poll() is None:
        child.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(STOP_TIMEOUT_S)
    _, left = psutil.wait_procs(tree, timeout=10)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=10)


def _tree(child: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        parent = psutil.Process(child.pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """Turn SIGINT and SIGTERM into `_Stopped`, so that the child is always stopped."""

    def stop(number: int, frame: object) -> None:
        raise _Stopped

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
