"""A real Redis on loopback; where none is installed its tests skip, and say so."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time

import pytest

needs_redis = pytest.mark.skipif(shutil.which("redis-server") is None, reason="no redis-server is installed")


class Redis:
    """A server of this test's own, which keeps nothing."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self) -> None:
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        self._process = subprocess.Popen(["redis-server", *options], stdout=subprocess.DEVNULL)
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except ConnectionRefusedError:
                assert self._process.poll() is None
                time.sleep(0.05)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
