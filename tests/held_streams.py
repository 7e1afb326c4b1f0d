"""Streams of images that are opened at once and held open, whatever they say."""

from __future__ import annotations

import json
import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

LET_IN = "let in"
WAIT_S = 60.0


class HeldStreams:
    """Opens so many for the time of the block, with one key; yields for each `LET_IN`, or the code of its error."""

    def __init__(self, url: str, key: str, body: dict[str, Any], count: int) -> None:
        self._url, self._headers, self._body = url, {"authorization": f"Bearer {key}"}, body
        self._left = threading.Event()
        self._pool = ThreadPoolExecutor(count)
        self._endings: queue.Queue[str] = queue.Queue()
        self._count = count

    def __enter__(self) -> list[str]:
        self._held = [self._pool.submit(self._hold) for _ in range(self._count)]
        return [self._endings.get(timeout=WAIT_S) for _ in range(self._count)]

    def __exit__(self, *_: object) -> None:
        self._left.set()
        self._pool.shutdown()

    def _hold(self) -> None:
        with (
            httpx.Client(timeout=WAIT_S, trust_env=False) as http,
            http.stream("POST", self._url, json=self._body, headers=self._headers) as reply,
        ):
            is_in = reply.status_code == 200
            self._endings.put(LET_IN if is_in else json.loads(reply.read())["error"]["code"])
            self._left.wait(WAIT_S)
