"""The headers that say how a reply's image was made.

Owns the response headers of a generation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from urllib.parse import quote

from starlette.responses import Response

from serve_app.core import AppliedAdapter, GenerationResult, Timings

EXPOSED_HEADERS = ", ".join(
    (
        "x-compute-type",
        "x-compute-time",
        "x-compute-characters",
        "x-seed",
        "x-base-model",
        "x-adapters",
        "x-batch-size",
        "x-warning",
        "server-timing",
        "x-request-id",
        "retry-after",
    )
)


class Stages:
    """Where the time of one request goes in the HTTP layer: from stage to stage, in milliseconds."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._began_at = self._ended_at = clock()
        self._durations_ms: dict[str, float] = {}

    def end(self, stage: str) -> None:
        """Note that a stage is over, and the next one begins."""
        now = self._clock()
        self._durations_ms[stage] = (now - self._ended_at) * 1e3
        self._ended_at = now

    def duration_ms(self, stage: str) -> float:
        """Return how long a stage took, 0 for one that never was."""
        return self._durations_ms.get(stage, 0.0)

    @property
    def total_ms(self) -> float:
        """From the start to the end of the last stage."""
        return (self._ended_at - self._began_at) * 1e3


def describe(response: Response, result: GenerationResult, prompt: str, stages: Stages) -> None:
    """Set the headers that tell a caller what was computed, with which weights, and where the time went."""
    headers = response.headers
    headers["x-compute-type"] = _plain(result.device)
    headers["x-compute-time"] = f"{result.compute_s:.3f}"
    headers["x-compute-characters"] = str(len(prompt))
    headers["x-seed"] = ",".join(str(seed) for seed in result.seeds)
    headers["x-base-model"] = header_id(result.base_id)
    headers["x-adapters"] = ", ".join(adapter_text(adapter) for adapter in result.adapters)
    headers["x-batch-size"] = str(result.batch_size)
    headers["server-timing"] = _server_timing(result.timings, stages)
    add_warnings(response, result.warnings)


def add_warnings(response: Response, warnings: Sequence[str]) -> None:
    """Tell what was done otherwise than asked."""
    for warning in warnings:
        response.headers.append("x-warning", _plain(warning))


def adapter_text(adapter: AppliedAdapter) -> str:
    """Return `id@revision;scale;layers matched`; separate scales are `denoiser/text encoder`."""
    counts = f"{adapter.layers_matched}/{adapter.layers_in_file}"
    return f"{header_id(adapter.id)}@{header_id(adapter.revision)};{adapter.scale:g};{counts}"


def _server_timing(timings: Timings, stages: Stages) -> str:
    """Return the stages; `hop` is the way to the replica and back, `total` all but the proxy and the wire."""
    durations_ms = {
        "queue": timings.queue_ms,
        "fetch": timings.fetch_ms,
        "swap": timings.swap_ms,
        "suspended": timings.suspended_ms,
        "denoise": timings.denoise_ms,
        "decode": timings.decode_ms,
    }
    own_ms = {
        "parse": stages.duration_ms("parse"),
        "hop": max(0.0, stages.duration_ms("service") - sum(durations_ms.values()) - timings.encode_ms),
        "encode": timings.encode_ms + stages.duration_ms("encode"),
        "total": stages.total_ms,
    }
    return ", ".join(f"{name};dur={duration_ms:.1f}" for name, duration_ms in (durations_ms | own_ms).items())


def header_id(text: str) -> str:
    """Return an id as a header may hold it."""
    return quote(text, safe="/:@.-_+")


def _plain(text: str) -> str:
    """Make text fit for a header: one line of printable ASCII, all else as visible escapes."""
    line = " ".join(text.split())[:1000].encode("ascii", "backslashreplace").decode("ascii")
    return "".join(character for character in line if character.isprintable())
