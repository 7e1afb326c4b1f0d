"""Callers in a process of their own: `python -m tests.open_loop MODE URL ...` prints how their requests ended.

`open` asks at a given rate whatever the answers, `closed` with so many callers that each wait for their answer, and
`health` asks for nothing but the service's health. A client that measures overload must cost little itself: this one
speaks just enough HTTP over connections that it keeps.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

PATIENCE_S = 60.0
# Of the callers that are refused, the share that does as `Retry-After` says; the others give up.
RETURNING = 0.02
# Of the refusals of the last second, how many ask again once the overload has passed.
LAST_RETURNING = 20
PROBE_S = 0.1


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer: 0 where the connection broke."""

    status: int
    retry_after_s: int | None
    took_s: float


class Connections:
    """As many connections as are needed at once, each used again."""

    def __init__(self, url: str, *, patience_s: float = PATIENCE_S) -> None:
        parts = urlsplit(url)
        self._patience_s = patience_s
        self._host, self._port = parts.hostname or "", parts.port or 80
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(self, method: str, path: str, body: bytes = b"") -> Reply:
        """Ask once; never raises over the answer."""
        began = time.perf_counter()
        head = f"{method} {path} HTTP/1.1\r\nhost: {self._host}\r\ncontent-length: {len(body)}\r\n\r\n"
        status, retry_after_s = 0, None
        try:
            reader, writer = self._idle.pop() if self._idle else await asyncio.open_connection(self._host, self._port)
        except OSError:
            return Reply(0, None, time.perf_counter() - began)
        try:
            writer.write(head.encode() + body)
            status, headers = await asyncio.wait_for(_read(reader), self._patience_s)
            retry_after_s = int(headers["retry-after"]) if "retry-after" in headers else None
            self._idle.append((reader, writer))
        except (OSError, ValueError, TimeoutError, asyncio.IncompleteReadError):
            writer.close()
        return Reply(status, retry_after_s, time.perf_counter() - began)

    async def close(self) -> None:
        for _, writer in self._idle:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        self._idle.clear()


async def _read(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
    if "chunked" in headers.get("transfer-encoding", ""):
        while size := int(await reader.readline(), 16):
            await reader.readexactly(size + 2)
        await reader.readline()
    else:
        await reader.readexactly(int(headers.get("content-length", 0)))
    return int(first.split()[1]), headers


@dataclass
class ReplicaStateCache:
    """What became of the requests."""

    statuses: Counter[int] = field(default_factory=Counter)
    served_s: list[float] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)
    retry_after_s: list[int] = field(default_factory=list)
    without_retry_after: int = 0
    returned: Counter[int] = field(default_factory=Counter)
    returned_after: Counter[int] = field(default_factory=Counter)
    most_at_once: int = 0

    def note(self, reply: Reply) -> None:
        self.statuses[reply.status] += 1
        if reply.status == 200:
            self.served_s.append(reply.took_s)
        elif reply.status == 429:
            self.refused_s.append(reply.took_s)
            if reply.retry_after_s is None:
                self.without_retry_after += 1
            else:
                self.retry_after_s.append(reply.retry_after_s)

    def told(self, seconds: float, served_in_time: int) -> dict[str, Any]:
        return {
            "seconds": seconds,
            "offered_per_s": sum(self.statuses.values()) / seconds,
            "goodput_per_s": served_in_time / seconds,
            "statuses": {str(status): count for status, count in sorted(self.statuses.items())},
            "served_s": spread(self.served_s),
            "refused_s": spread(self.refused_s),
            "retry_after_s": spread([float(value) for value in self.retry_after_s]),
            "without_retry_after": self.without_retry_after,
            "returned": {str(status): count for status, count in self.returned.items()},
            "returned_after": {str(status): count for status, count in self.returned_after.items()},
            "most_at_once": self.most_at_once,
        }


def spread(values: list[float]) -> dict[str, float] | None:
    """The least, the median, the 99th percentile and the most."""
    if not values:
        return None
    values = sorted(values)
    places = {"least": 0.0, "p50": 0.5, "p99": 0.99, "most": 1.0}
    return {name: round(values[min(len(values) - 1, int(place * len(values)))], 4) for name, place in places.items()}


class Callers:
    """Requests for one small image each, with seeds of their own."""

    def __init__(self, url: str, path: str, seed: int, parameters: dict[str, Any]) -> None:
        self._connections = Connections(url)
        self._path = path
        self._rng = random.Random(seed)
        self._parameters = parameters
        self._asked = 0
        self._at_once = 0
        self.ledger = ReplicaStateCache()
        self._last: list[tuple[float, int]] = []

    async def ask(self) -> Reply:
        self._asked += 1
        parameters = self._parameters | {"seed": self._asked}
        body = json.dumps({"inputs": f"a star {self._asked}", "parameters": parameters}).encode()
        self._at_once += 1
        self.ledger.most_at_once = max(self.ledger.most_at_once, self._at_once)
        try:
            return await self._connections.ask("POST", self._path, body)
        finally:
            self._at_once -= 1

    async def closed(self, callers: int, seconds: float) -> dict[str, Any]:
        ends_at = time.perf_counter() + seconds
        in_time: Counter[int] = Counter()

        async def keep_on() -> None:
            while time.perf_counter() < ends_at:
                reply = await self.ask()
                self.ledger.note(reply)
                in_time[reply.status] += time.perf_counter() < ends_at
                if reply.status == 429:
                    await asyncio.sleep(0.1)

        await asyncio.gather(*(keep_on() for _ in range(callers)))
        return self.ledger.told(seconds, in_time[200])

    async def open(self, rate: float, seconds: float) -> dict[str, Any]:
        began = time.perf_counter()
        due = began
        tasks: set[asyncio.Task[None]] = set()
        while (due := due + self._rng.expovariate(rate)) < began + seconds:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            task = asyncio.create_task(self._call(began + seconds))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        offered_s = time.perf_counter() - began
        served = self.ledger.statuses[200]
        await asyncio.gather(*tasks)
        await asyncio.gather(*(self._return_at(at, self.ledger.returned_after) for at in self._chosen()))
        return self.ledger.told(offered_s, served)

    async def _call(self, ends_at: float) -> None:
        reply = await self.ask()
        self.ledger.note(reply)
        if reply.status != 429 or reply.retry_after_s is None:
            return
        returns_at = time.perf_counter() + reply.retry_after_s
        if returns_at < ends_at:
            if self._rng.random() < RETURNING:
                await self._return_at(returns_at, self.ledger.returned)
        elif time.perf_counter() > ends_at - 1:
            self._last.append((returns_at, reply.retry_after_s))

    def _chosen(self) -> list[float]:
        chosen = self._rng.sample(self._last, min(LAST_RETURNING, len(self._last)))
        return [at for at, _ in chosen]

    async def _return_at(self, at: float, counts: Counter[int]) -> None:
        await asyncio.sleep(max(0.0, at - time.perf_counter()))
        counts[(await self.ask()).status] += 1


async def health(url: str, seconds: float) -> dict[str, Any]:
    """Ask for the health ten times a second; `/` and `/health` in turn."""
    connections = Connections(url)
    began = time.perf_counter()
    took: dict[str, list[float]] = {"/": [], "/health": []}
    failures = 0
    turn = 0
    while (now := time.perf_counter()) < began + seconds:
        path = list(took)[turn % 2]
        reply = await connections.ask("GET", path)
        took[path].append(reply.took_s * 1e3)
        failures += reply.status != 200
        turn += 1
        await asyncio.sleep(max(0.0, now + PROBE_S - time.perf_counter()))
    return {"failures": failures, **{path: spread(values) for path, values in took.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("open", "closed", "health"))
    parser.add_argument("url")
    parser.add_argument("--path", default="/")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--rate", type=float, default=1.0)
    parser.add_argument("--callers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--parameters", type=json.loads, default={})
    options = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        if options.mode == "health":
            result = asyncio.run(health(options.url, options.seconds))
        else:
            callers = Callers(options.url, options.path, options.seed, options.parameters)
            work = (
                callers.open(options.rate, options.seconds)
                if options.mode == "open"
                else callers.closed(options.callers, options.seconds)
            )
            result = asyncio.run(work)
        json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
