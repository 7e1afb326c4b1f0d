"""What a reply says about how its image came about.

Owns the response headers of a generation.
"""

from __future__ import annotations

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


def describe(response: Response, result: GenerationResult, prompt: str) -> None:
    """Set the headers that tell a caller what was computed, with which weights, and where the time went."""
    headers = response.headers
    headers["x-compute-type"] = _plain(result.device)
    headers["x-compute-time"] = f"{result.compute_s:.3f}"
    headers["x-compute-characters"] = str(len(prompt))
    headers["x-seed"] = ",".join(str(seed) for seed in result.seeds)
    headers["x-base-model"] = header_id(result.base_id)
    headers["x-adapters"] = ", ".join(adapter_text(adapter) for adapter in result.adapters)
    headers["x-batch-size"] = str(result.batch_size)
    headers["server-timing"] = _server_timing(result.timings)
    for warning in result.warnings:
        headers.append("x-warning", _plain(warning))


def adapter_text(adapter: AppliedAdapter) -> str:
    """Return `id@revision;scale;layers matched`; separate scales are `denoiser/text encoder`."""
    return f"{header_id(adapter.id)}@{header_id(adapter.revision)};{adapter.scale:g};{adapter.layers_matched}"


def _server_timing(timings: Timings) -> str:
    stages = {
        "queue": timings.queue_ms,
        "fetch": timings.fetch_ms,
        "swap": timings.swap_ms,
        "denoise": timings.denoise_ms,
        "decode": timings.decode_ms,
    }
    return ", ".join(f"{name};dur={duration_ms:.1f}" for name, duration_ms in stages.items())


def header_id(text: str) -> str:
    """Return an id as a header may hold it."""
    return quote(text, safe="/:@.-_+")


def _plain(text: str) -> str:
    """Make text fit for a header: one line of printable ASCII, whatever else as a visible escape."""
    line = " ".join(text.split())[:1000].encode("ascii", "backslashreplace").decode("ascii")
    return "".join(character for character in line if character.isprintable())
