"""Every metric of the service and its labels, declared once.

Owns the names, labels and buckets, and the two objects through which an ingress and a replica report. Serve
adds the labels deployment, replica and application by itself, to metrics made inside a replica: make these
objects there. Labels have few values: bases, tiers, error codes and route templates, never callers or prompts, and of
adapters those that `serve_app.observability.bounded_labels` names. Must not know where its numbers come from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ray.serve import metrics

from serve_app.core import GenerationRequest, GenerationResult, Timings
from serve_app.observability.bounded_labels import PRIVATE, BoundedLabels

# From a swap of a millisecond to a download of minutes.
SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
IMAGES = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One metric, before Ray's prefix `ray_` and, for counters, suffix `_total`."""

    name: str
    description: str
    labels: tuple[str, ...]
    buckets: tuple[float, ...] = ()

    @property
    def tag_keys(self) -> Any:
        """The labels, untyped: Ray annotates them as a tuple of exactly one."""
        return self.labels


REQUESTS = MetricSpec("loraplex_requests", "Requests answered.", ("route", "status", "base"))
REFUSALS = MetricSpec("loraplex_refusals", "Requests answered with an error, by its code.", ("code",))
RETRIES = MetricSpec("loraplex_retries", "Requests sent again as their replica was lost, by why.", ("base", "why"))
LOST = MetricSpec(
    "loraplex_ingress_losses", "Requests that lost their ingress replica, by what became of them.", ("result",)
)
QUEUE = MetricSpec("loraplex_queue_seconds", "Wait in a replica for the device.", ("base",), SECONDS)
FETCH = MetricSpec("loraplex_fetch_seconds", "Wait for the request's adapters.", ("base",), SECONDS)
SWAP = MetricSpec("loraplex_swap_seconds", "Applying the request's adapters.", ("base",), SECONDS)
DENOISE = MetricSpec("loraplex_denoise_seconds", "Denoising steps.", ("base",), SECONDS)
DECODE = MetricSpec("loraplex_decode_seconds", "Decoding latents to pixels.", ("base",), SECONDS)
BATCH = MetricSpec("loraplex_batch_images", "Images that shared the device pass.", ("base",), IMAGES)
ADAPTERS = MetricSpec("loraplex_adapters", "Adapters asked for, by where they were found.", ("base", "tier"))
FILES = MetricSpec("loraplex_file_fetches", "Adapter files brought to a node, by where from.", ("base", "tier"))
EVICTIONS = MetricSpec("loraplex_evictions", "Adapters that left host memory.", ("base",))
RESIDENT = MetricSpec("loraplex_resident_bytes", "Adapters in host memory.", ("base",))
# Few tell much: a label's value stays for as long as its process lives.
BY_ADAPTER = MetricSpec(
    "loraplex_adapter_requests", "Requests answered with images, by the adapters asked for most.", ("base", "adapter")
)
DEVICE_BY_ADAPTER = MetricSpec(
    "loraplex_adapter_device_seconds", "Device time of those requests' images.", ("base", "adapter")
)
SPANS = MetricSpec("loraplex_spans", "Spans of traces, by whether the collector took them.", ("result",))
CANCELLED = MetricSpec(
    "loraplex_cancelled", "Requests given up by their caller or deadline, by how far they were.", ("base", "stage")
)
SELF_CHECKS = MetricSpec(
    "loraplex_self_checks", "Times that a base's loaded weights were checked bit by bit.", ("base", "result")
)

QUARANTINED = MetricSpec(
    "loraplex_quarantined", "Adapters, by scale, refused for now because they failed on the device.", ("base",)
)

SHORTAGES = MetricSpec(
    "loraplex_memory_shortages", "Times that a device had no room, by what came of the second try.", ("base", "outcome")
)
BACKLOG = MetricSpec("loraplex_backlog_seconds", "Predicted work that runs, waits or fetches.", ("base",))
PREDICTED = MetricSpec("loraplex_predicted_seconds", "What finished passes were predicted to take.", ("base",))
BUSY = MetricSpec("loraplex_busy_seconds", "What finished passes took.", ("base",))
START = MetricSpec("loraplex_start_seconds", "From the start of a replica to its first request.", ("base",))
WARMED = MetricSpec("loraplex_warmed_adapters", "Adapters made ready before a replica's first request.", ("base",))
ROUTED = MetricSpec(
    "loraplex_routed",
    "Requests sent to a replica, by where there the farthest of their adapters was.",
    ("base", "place"),
)
ALIASES = MetricSpec("loraplex_aliases", "Further names of adapters that an ingress replica knows.", ())
ACCESS = MetricSpec("loraplex_access_checks", "Checks of a caller's access with its own Hub token.", ("result",))
GRANTS = MetricSpec("loraplex_key_grants", "Requests of keys with limits that were let in, by whose count.", ("by",))

DECLARED = (
    ALIASES, ACCESS, GRANTS,
    REQUESTS, REFUSALS, RETRIES, LOST,
    QUEUE, FETCH, SWAP, DENOISE, DECODE, BATCH, ADAPTERS, FILES, EVICTIONS, RESIDENT, CANCELLED, SELF_CHECKS,
    QUARANTINED, SHORTAGES, BACKLOG, PREDICTED, BUSY, START, WARMED, ROUTED, BY_ADAPTER, DEVICE_BY_ADAPTER, SPANS,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class MetricFactory:
    """The kinds of metric; tests hand in ones that also remember."""

    counter_type: type[metrics.Counter] = metrics.Counter
    gauge_type: type[metrics.Gauge] = metrics.Gauge
    histogram_type: type[metrics.Histogram] = metrics.Histogram

    def counter(self, declared: MetricSpec) -> metrics.Counter:
        """Make a declared counter."""
        return self.counter_type(declared.name, declared.description, declared.tag_keys)

    def gauge(self, declared: MetricSpec) -> metrics.Gauge:
        """Make a declared gauge."""
        return self.gauge_type(declared.name, declared.description, declared.tag_keys)

    def histogram(self, declared: MetricSpec) -> metrics.Histogram:
        """Make a declared histogram."""
        return self.histogram_type(declared.name, declared.description, list(declared.buckets), declared.tag_keys)


class ProxyMetrics:
    """What the layers around one of Serve's proxies report."""

    def __init__(self, meters: MetricFactory | None = None) -> None:
        meters = meters or MetricFactory()
        self._lost = meters.counter(LOST)
        self._refusals = meters.counter(REFUSALS)

    def lost(self, result: str) -> None:
        """Count a request that lost its ingress replica: it was sent again, refused, or its answer cut off."""
        self._lost.inc(1, {"result": result})

    def shed(self) -> None:
        """Count a request that is refused before an ingress replica has seen it."""
        self._refusals.inc(1, {"code": "overloaded"})


class TracingMetrics:
    """What one process reports of its traces."""

    def __init__(self, meters: MetricFactory | None = None) -> None:
        self._spans = (meters or MetricFactory()).counter(SPANS)

    def sent(self, spans: int, is_sent: bool) -> None:
        """Count spans that the collector took, or that are lost."""
        self._spans.inc(spans, {"result": "sent" if is_sent else "lost"})


class AdapterMetrics:
    """What one ingress replica reports by adapter: of the `top` asked for most of late each by its id, the rest
    together, and together those that not everybody may read."""

    def __init__(self, top: int, *, clock: Callable[[], float], meters: MetricFactory | None = None) -> None:
        meters = meters or MetricFactory()
        self._names = BoundedLabels(top, clock=clock)
        self._requests = meters.counter(BY_ADAPTER)
        self._device_s = meters.counter(DEVICE_BY_ADAPTER)

    def drawn(self, request: GenerationRequest, result: GenerationResult) -> None:
        """Count a request that got its images; one with several adapters counts for each of them."""
        # Requests that shared a pass share its time.
        device_s = result.compute_s * request.num_images / max(result.batch_size, 1)
        for use in request.adapters:
            name = self._names.label(use.spec.id) if request.hub_token is None else PRIVATE
            labels = {"base": request.base_id, "adapter": name}
            self._requests.inc(1, labels)
            if device_s > 0:
                self._device_s.inc(device_s, labels)


class IngressMetrics:
    """What one ingress replica reports."""

    def __init__(self, meters: MetricFactory | None = None) -> None:
        meters = meters or MetricFactory()
        self._requests = meters.counter(REQUESTS)
        self._refusals = meters.counter(REFUSALS)
        self._retries = meters.counter(RETRIES)
        self._aliases = meters.gauge(ALIASES)
        self._access = meters.counter(ACCESS)
        self._grants = meters.counter(GRANTS)

    def answered(self, *, route: str, status: int, base_id: str | None) -> None:
        """Count an answer; `route` is the template, not the path, and the base is None while unknown."""
        self._requests.inc(1, {"route": route, "status": str(status), "base": base_id or "none"})

    def refused(self, code: str) -> None:
        """Count an error by its stable code."""
        self._refusals.inc(1, {"code": code})

    def aliases_known(self, count: int) -> None:
        """Report how many aliases are known here."""
        self._aliases.set(count, {})

    def access_checked(self, result: str) -> None:
        """Count a check of a caller's access: "ok", or the code of its refusal."""
        self._access.inc(1, {"result": result})

    def granted(self, by: str) -> None:
        """Count a request of a key with limits: let in by the "keeper" of all, or as this replica's "share"."""
        self._grants.inc(1, {"by": by})

    def retried(self, base_id: str, why: str) -> None:
        """Count a request that goes to another replica, by why its first one was lost."""
        self._retries.inc(1, {"base": base_id, "why": why})


class RouterMetrics:
    """What the router of one base reports, in each process that routes."""

    def __init__(self, base_id: str, meters: MetricFactory | None = None) -> None:
        self._base = {"base": base_id}
        self._routed = (meters or MetricFactory()).counter(ROUTED)

    def routed(self, place: str) -> None:
        """Count a request that a replica has taken, by where its adapters were said to be there."""
        self._routed.inc(1, {**self._base, "place": place})


class ReplicaMetrics:
    """What one replica of a base reports."""

    def __init__(self, base_id: str, meters: MetricFactory | None = None) -> None:
        meters = meters or MetricFactory()
        self._base = {"base": base_id}
        self._queue = meters.histogram(QUEUE)
        self._fetch = meters.histogram(FETCH)
        self._swap = meters.histogram(SWAP)
        self._denoise = meters.histogram(DENOISE)
        self._decode = meters.histogram(DECODE)
        self._batch = meters.histogram(BATCH)
        self._adapters = meters.counter(ADAPTERS)
        self._files = meters.counter(FILES)
        self._evictions = meters.counter(EVICTIONS)
        self._resident = meters.gauge(RESIDENT)
        self._cancelled = meters.counter(CANCELLED)
        self._evictions_reported = 0
        self._self_checks = meters.counter(SELF_CHECKS)
        self._quarantined = meters.gauge(QUARANTINED)
        self._shortages = meters.counter(SHORTAGES)
        self._shortages_reported = {"recovered": 0, "refused": 0}
        self._sound_reported = 0
        self._is_mismatch_reported = False
        self._backlog = meters.gauge(BACKLOG)
        self._predicted = meters.counter(PREDICTED)
        self._busy = meters.counter(BUSY)
        self._predicted_reported = self._busy_reported = 0.0
        self._start = meters.gauge(START)
        self._warmed = meters.counter(WARMED)

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

    def file_brought(self, tier: str) -> None:
        """Count one file that came to this node, from the "hub" or a "peer"."""
        self._files.inc(1, {**self._base, "tier": tier})

    def host_tier(self, *, used_bytes: int, evictions: int) -> None:
        """Report the host tier as it is now; `evictions` counts since the replica's start."""
        self._resident.set(used_bytes, self._base)
        # Ray's counters refuse to be raised by nothing.
        if evictions > self._evictions_reported:
            self._evictions.inc(evictions - self._evictions_reported, self._base)
            self._evictions_reported = evictions

    def worked(self, *, backlog_s: float, predicted_s: float, busy_s: float) -> None:
        """Report the work ahead, and what all passes since the start were predicted to take and took."""
        self._backlog.set(backlog_s, self._base)
        if predicted_s > self._predicted_reported:
            self._predicted.inc(predicted_s - self._predicted_reported, self._base)
            self._predicted_reported = predicted_s
        if busy_s > self._busy_reported:
            self._busy.inc(busy_s - self._busy_reported, self._base)
            self._busy_reported = busy_s

    def started(self, *, start_s: float, warmed: int) -> None:
        """Report how long this replica took to start, and how many adapters it made ready meanwhile."""
        self._start.set(start_s, self._base)
        if warmed:
            self._warmed.inc(warmed, self._base)

    def quarantined(self, held: int) -> None:
        """Report how many compositions of adapters are refused now."""
        self._quarantined.set(held, self._base)

    def self_checked(self, *, sound: int, is_corrupt: bool) -> None:
        """Report the rounds that found the weights as they were loaded, counted since the start, and a mismatch."""
        if sound > self._sound_reported:
            self._self_checks.inc(sound - self._sound_reported, {**self._base, "result": "ok"})
            self._sound_reported = sound
        if is_corrupt and not self._is_mismatch_reported:
            self._self_checks.inc(1, {**self._base, "result": "mismatch"})
            self._is_mismatch_reported = True

    def out_of_memory(self, *, recovered: int, refused: int) -> None:
        """Report how often memory ran out, counted since the start, by what came of the second try."""
        for outcome, count in (("recovered", recovered), ("refused", refused)):
            if count > self._shortages_reported[outcome]:
                self._shortages.inc(count - self._shortages_reported[outcome], {**self._base, "outcome": outcome})
                self._shortages_reported[outcome] = count
