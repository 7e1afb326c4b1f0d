"""Every metric of the service and its labels, declared once.

Owns the names, labels and buckets, and the two objects through which an ingress and a replica report. Serve
adds the labels deployment, replica and application by itself, to metrics made inside a replica: make these
objects there. Labels have few values: bases, tiers, error codes and route templates, never adapters, callers
or prompts. Must not know where its numbers come from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ray.serve import metrics

from serve_app.core import Timings

# From a swap of a millisecond to a download of minutes.
SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
IMAGES = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)


@dataclass(frozen=True, slots=True)
class Declaration:
    """One metric, before Ray's prefix `ray_` and, for counters, suffix `_total`."""

    name: str
    description: str
    labels: tuple[str, ...]
    buckets: tuple[float, ...] = ()

    @property
    def tag_keys(self) -> Any:
        """The labels, untyped: Ray annotates them as a tuple of exactly one."""
        return self.labels


REQUESTS = Declaration("loraplex_requests", "Requests answered.", ("route", "status", "base"))
REFUSALS = Declaration("loraplex_refusals", "Requests answered with an error, by its code.", ("code",))
RETRIES = Declaration("loraplex_retries", "Requests sent again because their replica was lost.", ("base",))
QUEUE = Declaration("loraplex_queue_seconds", "Wait in a replica for the device.", ("base",), SECONDS)
FETCH = Declaration("loraplex_fetch_seconds", "Wait for the request's adapters.", ("base",), SECONDS)
SWAP = Declaration("loraplex_swap_seconds", "Applying the request's adapters.", ("base",), SECONDS)
DENOISE = Declaration("loraplex_denoise_seconds", "Denoising steps.", ("base",), SECONDS)
DECODE = Declaration("loraplex_decode_seconds", "Decoding latents to pixels.", ("base",), SECONDS)
BATCH = Declaration("loraplex_batch_images", "Images that shared the device pass.", ("base",), IMAGES)
ADAPTERS = Declaration("loraplex_adapters", "Adapters asked for, by where they were found.", ("base", "tier"))
EVICTIONS = Declaration("loraplex_evictions", "Adapters that left host memory.", ("base",))
RESIDENT = Declaration("loraplex_resident_bytes", "Adapters in host memory.", ("base",))
CANCELLED = Declaration(
    "loraplex_cancelled", "Requests given up by their caller or deadline, by how far they were.", ("base", "stage")
)
SELF_CHECKS = Declaration(
    "loraplex_self_checks", "Times that a base's loaded weights were checked bit by bit.", ("base", "result")
)

DECLARED = (
    REQUESTS, REFUSALS, RETRIES,
    QUEUE, FETCH, SWAP, DENOISE, DECODE, BATCH, ADAPTERS, EVICTIONS, RESIDENT, CANCELLED, SELF_CHECKS,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Meters:
    """The kinds of metric; tests hand in ones that also remember."""

    counter: type[metrics.Counter] = metrics.Counter
    gauge: type[metrics.Gauge] = metrics.Gauge
    histogram: type[metrics.Histogram] = metrics.Histogram

    def count(self, declared: Declaration) -> metrics.Counter:
        """Make a declared counter."""
        return self.counter(declared.name, declared.description, declared.tag_keys)

    def level(self, declared: Declaration) -> metrics.Gauge:
        """Make a declared gauge."""
        return self.gauge(declared.name, declared.description, declared.tag_keys)

    def spread(self, declared: Declaration) -> metrics.Histogram:
        """Make a declared histogram."""
        return self.histogram(declared.name, declared.description, list(declared.buckets), declared.tag_keys)


class IngressMetrics:
    """What one ingress replica reports."""

    def __init__(self, meters: Meters | None = None) -> None:
        meters = meters or Meters()
        self._requests = meters.count(REQUESTS)
        self._refusals = meters.count(REFUSALS)
        self._retries = meters.count(RETRIES)

    def answered(self, *, route: str, status: int, base_id: str | None) -> None:
        """Count an answer; `route` is the template, not the path, and the base is None while unknown."""
        self._requests.inc(1, {"route": route, "status": str(status), "base": base_id or "none"})

    def refused(self, code: str) -> None:
        """Count an error by its stable code."""
        self._refusals.inc(1, {"code": code})

    def retried(self, base_id: str) -> None:
        """Count a request that goes to another replica."""
        self._retries.inc(1, {"base": base_id})


class ReplicaMetrics:
    """What one replica of a base reports."""

    def __init__(self, base_id: str, meters: Meters | None = None) -> None:
        meters = meters or Meters()
        self._base = {"base": base_id}
        self._queue = meters.spread(QUEUE)
        self._fetch = meters.spread(FETCH)
        self._swap = meters.spread(SWAP)
        self._denoise = meters.spread(DENOISE)
        self._decode = meters.spread(DECODE)
        self._batch = meters.spread(BATCH)
        self._adapters = meters.count(ADAPTERS)
        self._evictions = meters.count(EVICTIONS)
        self._resident = meters.level(RESIDENT)
        self._cancelled = meters.count(CANCELLED)
        self._evictions_reported = 0
        self._self_checks = meters.count(SELF_CHECKS)
        self._sound_reported = 0
        self._is_mismatch_reported = False

    def served(self, timings: Timings, *, batch_size: int) -> None:
        """Report where the time of one finished request went."""
        self._queue.observe(timings.queue_ms / 1000, self._base)
        self._fetch.observe(timings.fetch_ms / 1000, self._base)
        self._swap.observe(timings.swap_ms / 1000, self._base)
        self._denoise.observe(timings.denoise_ms / 1000, self._base)
        self._decode.observe(timings.decode_ms / 1000, self._base)
        self._batch.observe(batch_size, self._base)

    def cancelled(self, stage: str) -> None:
        """Count a request that nobody waited for any more, at the stage "fetching", "queued" or "running"."""
        self._cancelled.inc(1, {**self._base, "stage": stage})

    def adapter_found(self, tier: str) -> None:
        """Count one leased adapter by the tier it was found on."""
        self._adapters.inc(1, {**self._base, "tier": tier})

    def host_tier(self, *, used_bytes: int, evictions: int) -> None:
        """Report the host tier as it is now; `evictions` counts since the replica's start."""
        self._resident.set(used_bytes, self._base)
        # Ray's counters refuse to be raised by nothing.
        if evictions > self._evictions_reported:
            self._evictions.inc(evictions - self._evictions_reported, self._base)
            self._evictions_reported = evictions

    def self_checked(self, *, sound: int, is_corrupt: bool) -> None:
        """Report the rounds that found the weights as they were loaded, counted since the start, and a mismatch."""
        if sound > self._sound_reported:
            self._self_checks.inc(sound - self._sound_reported, {**self._base, "result": "ok"})
            self._sound_reported = sound
        if is_corrupt and not self._is_mismatch_reported:
            self._self_checks.inc(1, {**self._base, "result": "mismatch"})
            self._is_mismatch_reported = True
