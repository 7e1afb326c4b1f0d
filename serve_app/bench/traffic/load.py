"""Traffic sent to a live service at a rate of its own, however slowly answers come back.

Owns the sending: an open loop, since a client that waits for answers would hide the very queue that it makes. Every
request has the Hugging Face shape, which draws one image. Must not know what the service is made of.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from serve_app.bench.measuring.options import BenchmarkRefused
from serve_app.bench.traffic.load_report import LoadReport, Sample, report_of
from serve_app.bench.traffic.workload import AdapterAsk, Traffic, generate
from serve_app.bench.traffic.workload_csv import read_workload

CONNECT_TIMEOUT_S = 10.0
LOOPBACK = ("localhost", "127.0.0.1", "::1")
PROMPTS = ("a red circle on a blue background", "a lighthouse in a storm", "a bowl of fruit", "a street at night")

# Told how far the run is, as a share, and how it goes.
OnProgress = Callable[[float, str], None]


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """One run against one service.

    `adapters` are by popularity, most popular first; none means all that the service knows. `csv_file` replays
    instead, `speed` times as fast, and then the rate is the file's own. Requests are offered until the
    first of `duration_s` and `max_requests`; the run ends with the last answer. `key` is in no report.
    """

    url: str
    rate_per_s: float = 1.0
    duration_s: float = 60.0
    max_requests: int = 1000
    adapters: tuple[str, ...] = ()
    csv_file: Path | None = None
    speed: float = 1.0
    steps: int | None = None
    side: int | None = None
    seed: int = 0
    timeout_s: float = 120.0
    key: str | None = dataclasses.field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Planned:
    """One request to send: when, with which adapters, and what its parameters say beside them."""

    at_s: float
    adapters: tuple[AdapterAsk, ...]
    parameters: Mapping[str, int]
    prompt: str


def run_load(
    options: LoadOptions, *, command: str = "", on_progress: OnProgress = lambda share, text: None
) -> LoadReport:
    """Send the traffic and return what came back.

    Raises:
        BenchmarkRefused: no service answers there, or it refuses to say what it serves.
        WorkloadUnreadable: the CSV file cannot be read.
    """
    return asyncio.run(_run(options, command, on_progress))


async def _run(options: LoadOptions, command: str, on_progress: OnProgress) -> LoadReport:
    async with _client(options) as client:
        known = options.adapters or await _known_adapters(client, options.url)
        planned = plan_requests(options, known)
        samples, took_s = await _send_all(client, options, planned, on_progress)
    return report_of(samples, took_s, command=command, url=options.url)


def _client(options: LoadOptions) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        headers={"authorization": f"Bearer {options.key}"} if options.key else {},
        timeout=httpx.Timeout(options.timeout_s, connect=min(options.timeout_s, CONNECT_TIMEOUT_S), pool=None),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=100),
        # A proxy of the environment is for the world outside, never for this machine.
        trust_env=urlsplit(options.url).hostname not in LOOPBACK,
    )


async def _known_adapters(client: httpx.AsyncClient, url: str) -> tuple[str, ...]:
    """Return the adapters that the service lists, in its order."""
    found: list[str] = []
    query: dict[str, str] = {}
    try:
        while True:
            reply = await client.get(f"{url}/v1/models", params=query)
            if reply.status_code != HTTPStatus.OK:
                raise BenchmarkRefused(f"{url} answered HTTP {reply.status_code} when asked what it serves")
            page = reply.json()
            found += [entry["id"] for entry in page["data"] if entry["parent"] is not None]
            if not page["has_more"]:
                return tuple(found)
            query = {"after": page["last_id"]}
    except httpx.HTTPError as error:
        raise BenchmarkRefused(f"no service at {url}: {type(error).__name__}") from None
    except (KeyError, TypeError, ValueError):
        raise BenchmarkRefused(f"what answers at {url} is no Loraplex service") from None


def plan_requests(options: LoadOptions, known: tuple[str, ...]) -> tuple[Planned, ...]:
    """Return what to send when: sessions over the known adapters at the asked rate, or the rows of a CSV file."""
    rng = random.Random(options.seed)
    fixed = {"num_inference_steps": options.steps, "width": options.side, "height": options.side}
    parameters = {name: value for name, value in fixed.items() if value is not None}
    if options.csv_file is not None:
        rows = read_workload(options.csv_file).arrivals
        timed = [(row.at_s - rows[0].at_s, row) for row in rows]
        kept = [(at_s / options.speed, row) for at_s, row in timed if at_s / options.speed < options.duration_s]
        return tuple(
            Planned(
                at_s,
                row.adapters,
                {"num_inference_steps": row.steps, "width": row.width, "height": row.height} | parameters,
                rng.choice(PROMPTS),
            )
            for at_s, row in kept[: options.max_requests]
        )
    asked = _adapters_in_turn(options, known)
    planned: list[Planned] = []
    at_s = 0.0
    while at_s < options.duration_s and len(planned) < options.max_requests:
        planned.append(Planned(at_s, asked[len(planned) % len(asked)], parameters, rng.choice(PROMPTS)))
        at_s += rng.expovariate(options.rate_per_s)
    return tuple(planned)


def _adapters_in_turn(options: LoadOptions, known: tuple[str, ...]) -> list[tuple[AdapterAsk, ...]]:
    """Return the adapters of one request after another: sessions by popularity, one adapter a request."""
    if not known:
        return [()]
    count = min(options.max_requests, int(options.rate_per_s * options.duration_s * 2) + 10)
    traffic = dataclasses.replace(
        Traffic().scaled(count, len(known)), several=((1, 1.0),), hours=(1.0,) * 24, varied_scales=0.0
    )
    arrivals = generate(traffic, options.seed).arrivals
    # The generator's names count popularity.
    return [tuple(AdapterAsk(known[int(ask.key.rpartition("-")[2])]) for ask in one.adapters) for one in arrivals]


async def _send_all(
    client: httpx.AsyncClient, options: LoadOptions, planned: tuple[Planned, ...], on_progress: OnProgress
) -> tuple[list[Sample], float]:
    started_s = time.perf_counter()
    samples: list[Sample] = []

    async def send(number: int, one: Planned) -> None:
        samples.append(await _send(client, options, one, options.seed + number, started_s))
        bad = sum(not sample.is_answered for sample in samples)
        text = f"{len(samples)} of {len(planned)} answered" + (f", {bad} without an image" if bad else "")
        on_progress(len(samples) / len(planned), text)

    async with asyncio.TaskGroup() as tasks:
        for number, one in enumerate(planned):
            await asyncio.sleep(max(started_s + one.at_s - time.perf_counter(), 0.0))
            tasks.create_task(send(number, one))
    samples.sort(key=lambda sample: sample.planned_s)
    return samples, time.perf_counter() - started_s


async def _send(client: httpx.AsyncClient, options: LoadOptions, one: Planned, seed: int, started_s: float) -> Sample:
    loras = [{"id": ask.key, "scale": ask.scale} for ask in one.adapters]
    parameters: dict[str, Any] = {**one.parameters, "seed": seed} | ({"loras": loras} if loras else {})
    sent_s = time.perf_counter() - started_s
    status, code, headers = 0, None, httpx.Headers()
    try:
        reply = await client.post(
            f"{options.url}/", json={"inputs": one.prompt, "parameters": parameters}, headers={"accept": "image/png"}
        )
        status, headers = reply.status_code, reply.headers
        code = None if reply.is_success else _code(reply)
    except httpx.TimeoutException:
        code = "client_timeout"
    except httpx.HTTPError as error:
        code = f"connection_{type(error).__name__}"
    return Sample(
        planned_s=one.at_s,
        sent_s=sent_s,
        took_s=time.perf_counter() - started_s - sent_s,
        adapters=tuple(ask.key for ask in one.adapters),
        status=status,
        code=code,
        timing_ms=_timing(headers.get("server-timing", "")),
    )


def _code(reply: httpx.Response) -> str:
    try:
        return str(reply.json()["code"])[:80]
    except (ValueError, KeyError, TypeError):
        return f"http_{reply.status_code}"


def _timing(text: str) -> dict[str, float]:
    """Return the milliseconds of each stage; a header that cannot be read says nothing."""
    stages: dict[str, float] = {}
    for part in text.split(","):
        name, _, duration = part.strip().partition(";dur=")
        try:
            stages[name] = float(duration)
        except ValueError:
            continue
    return stages
