"""Every metric of the service and its labels, declared once.

Owns the names, labels and buckets, and the objects through which each part of the service reports. Serve adds the
labels deployment, replica and application to metrics that are created inside a replica, so create these objects there.
Labels have few values: bases, tiers, error codes and route templates, never prompts; of adapters, and of callers by a
hash, only those that `serve_app.observability.bounded_labels` allows. Must not know where its numbers come from.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ray.serve import metrics

from serve_app.core import GenerationRequest, GenerationResult, Timings
from serve_app.observability.bounded_labels import PRIVATE, BoundedLabels

# From a swap of a millisecond to a download of minutes.
SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
IMAGES = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)
FACTORS = (1.0, 1.1, 1.5, 2.0, 3.0, 5.0, 7.0, 10.0, 15.0, 30.0)
# How many callers' shares of the device's time are told apart.
SHARES_TOLD = 16


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
        return (*self.labels, *FORMER_LABELS.get(self.name, {}))


# Names of metrics and their labels in the last version. Both names are exported until the next one.
FORMER_NAMES = {"loraplex_adapter_lookups": "loraplex_adapters"}
FORMER_LABELS = {
    "loraplex_file_fetches": {"tier": "source"},
    "loraplex_routed": {"place": "tier"},
    "loraplex_retries": {"why": "reason"},
    "loraplex_ingress_losses": {"result": "outcome"},
    "loraplex_spans": {"result": "outcome"},
    "loraplex_self_checks": {"result": "outcome"},
    "loraplex_access_checks": {"result": "outcome"},
}


REQUESTS = MetricSpec("loraplex_requests", "Requests answered.", ("route", "status", "base"))
REFUSALS = MetricSpec("loraplex_refusals", "Requests answered with an error, by its code.", ("code",))
RETRIES = MetricSpec(
    "loraplex_retries", "Requests sent again as their replica was lost, by reason.", ("base", "reason")
)
LOST = MetricSpec("loraplex_ingress_losses", "Requests that lost their ingress replica, by outcome.", ("outcome",))
QUEUE = MetricSpec("loraplex_queue_seconds", "Wait in a replica for the device.", ("base",), SECONDS)
FETCH = MetricSpec("loraplex_fetch_seconds", "Wait for the request's adapters.", ("base",), SECONDS)
SWAP = MetricSpec("loraplex_swap_seconds", "Applying the request's adapters.", ("base",), SECONDS)
SUSPENDED = MetricSpec("loraplex_suspended_seconds", "Set aside between steps for others.", ("base",), SECONDS)
SLOWDOWN = MetricSpec(
    "loraplex_slowdown", "A request's time in a replica's queue and device over its device time.", ("base",), FACTORS
)
CHANGES = MetricSpec("loraplex_adapter_changes", "Changes of the adapters in the weights.", ("base",))
CHANGING = MetricSpec("loraplex_changing_seconds", "Device time of those changes.", ("base",))
SHARE = MetricSpec(
    "loraplex_share_device_seconds", "Device time by key, each told by a hash; few of them.", ("base", "share")
)
SHARE_IMAGES = MetricSpec("loraplex_share_images", "Images by key, each told by a hash; few.", ("base", "share"))
DENOISE = MetricSpec("loraplex_denoise_seconds", "Denoising steps.", ("base",), SECONDS)
DECODE = MetricSpec("loraplex_decode_seconds", "Decoding latents to pixels.", ("base",), SECONDS)
BATCH = MetricSpec("loraplex_batch_images", "Images that shared the device pass.", ("base",), IMAGES)
LOOKUPS = MetricSpec(
    "loraplex_adapter_lookups", "Adapters requested, by the tier they were found on.", ("base", "tier")
)
FILES = MetricSpec("loraplex_file_fetches", "Adapter files copied to a node, by source.", ("base", "source"))
BASE_BYTES = MetricSpec("loraplex_base_fetched_bytes", "A base's files brought, by source.", ("base", "source"))
EVICTIONS = MetricSpec("loraplex_evictions", "Adapters that left host memory.", ("base",))
RESIDENT = MetricSpec("loraplex_resident_bytes", "Adapters in host memory.", ("base",))
# A label's value stays as long as its process, so only few adapters get one.
BY_ADAPTER = MetricSpec(
    "loraplex_adapter_requests", "Requests answered with images, by the most requested adapters.", ("base", "adapter")
)
DEVICE_BY_ADAPTER = MetricSpec(
    "loraplex_adapter_device_seconds", "Device time of those requests' images.", ("base", "adapter")
)
SPANS = MetricSpec("loraplex_spans", "Spans of traces, by whether the collector accepted them.", ("outcome",))
CANCELLED = MetricSpec(
    "loraplex_cancelled",
    "Requests cancelled by their caller or deadline, by the stage they had reached.",
    ("base", "stage"),
)
SELF_CHECKS = MetricSpec("loraplex_self_checks", "Complete checks of a base's loaded weights.", ("base", "outcome"))

QUARANTINED = MetricSpec(
    "loraplex_quarantined", "Adapter sets in quarantine because they failed on the device.", ("base",)
)

SHORTAGES = MetricSpec(
    "loraplex_memory_shortages",
    "Times that a device ran out of memory, by the outcome of the second try.",
    ("base", "outcome"),
)
BACKLOG = MetricSpec("loraplex_backlog_seconds", "Predicted work that runs, waits or fetches adapters.", ("base",))
PREDICTED = MetricSpec("loraplex_predicted_seconds", "Predicted time of finished passes.", ("base",))
BUSY = MetricSpec("loraplex_busy_seconds", "Measured time of finished passes.", ("base",))
START = MetricSpec("loraplex_start_seconds", "From when Serve asked for a replica to its first request.", ("base",))
START_WAITS = MetricSpec(
    "loraplex_start_waits", "Requests that found no replica, by what became of their wait.", ("base", "outcome")
)
WARMED = MetricSpec("loraplex_warmed_adapters", "Adapters fetched before a replica's first request.", ("base",))
ROUTED = MetricSpec(
    "loraplex_routed",
    "Requests sent to a replica, by the slowest tier of their adapters there.",
    ("base", "tier"),
)
ALIASES = MetricSpec("loraplex_aliases", "Aliases that an ingress replica knows.", ())
ACCESS = MetricSpec("loraplex_access_checks", "Checks of a caller's access with its own Hub token.", ("outcome",))

DECLARED = (
    ALIASES, ACCESS,
    REQUESTS, REFUSALS, RETRIES, LOST,
    SUSPENDED, SLOWDOWN, CHANGES, CHANGING, SHARE, SHARE_IMAGES, START_WAITS,
    QUEUE, FETCH, SWAP, DENOISE, DECODE, BATCH, LOOKUPS, FILES, BASE_BYTES, EVICTIONS, RESIDENT, CANCELLED, SELF_CHECKS,
    QUARANTINED, SHORTAGES, BACKLOG, PREDICTED, BUSY, START, WARMED, ROUTED, BY_ADAPTER, DEVICE_BY_ADAPTER, SPANS,
)  # fmt: skip


class Counter:
    """A counter under its present name and labels, and for one version also under the former ones."""

    def __init__(self, counters: tuple[metrics.Counter, ...], former_labels: Mapping[str, str]) -> None:
        self._counters = counters
        self._former_labels = former_labels

    def inc(self, value: float, labels: dict[str, str]) -> None:
        """Add to the counter; `labels` has the present labels."""
        tags = labels | {old: labels[new] for old, new in self._former_labels.items()}
        for counter in self._counters:
            counter.inc(value, tags)


@dataclass(frozen=True, slots=True)
class MetricFactory:
    """Creates metrics of the given types; tests pass types that record every value."""

    counter_type: type[metrics.Counter] = metrics.Counter
    gauge_type: type[metrics.Gauge] = metrics.Gauge
    histogram_type: type[metrics.Histogram] = metrics.Histogram

    def counter(self, declared: MetricSpec) -> Counter:
        """Create a counter."""
        names = filter(None, (declared.name, FORMER_NAMES.get(declared.name)))
        counters = tuple(self.counter_type(name, declared.description, declared.tag_keys) for name in names)
        return Counter(counters, FORMER_LABELS.get(declared.name, {}))

    def gauge(self, declared: MetricSpec) -> metrics.Gauge:
        """Create a gauge."""
        return self.gauge_type(declared.name, declared.description, declared.tag_keys)

    def histogram(self, declared: MetricSpec) -> metrics.Histogram:
        """Create a histogram."""
        return self.histogram_type(declared.name, declared.description, list(declared.buckets), declared.tag_keys)


class ProxyMetrics:
    """Metrics of the layers before one of Serve's proxies."""

    def __init__(self, factory: MetricFactory | None = None) -> None:
        factory = factory or MetricFactory()
        self._lost = factory.counter(LOST)
        self._refusals = factory.counter(REFUSALS)

    def lost(self, outcome: str) -> None:
        """Count a request that lost its ingress replica: "resent", "refused", or its reply "cut"."""
        self._lost.inc(1, {"outcome": outcome})

    def shed(self) -> None:
        """Count a request that is rejected before it reaches an ingress replica."""
        self._refusals.inc(1, {"code": "overloaded"})


class TracingMetrics:
    """Metrics of one process's traces."""

    def __init__(self, factory: MetricFactory | None = None) -> None:
        self._spans = (factory or MetricFactory()).counter(SPANS)

    def sent(self, spans: int, is_sent: bool) -> None:
        """Count spans that the collector accepted, or that are lost."""
        self._spans.inc(spans, {"outcome": "sent" if is_sent else "lost"})


class AdapterMetrics:
    """Metrics by adapter of one ingress replica.

    The `top` most requested adapters get their own label; all others share `other`, private ones share `private`.
    """

    def __init__(self, top: int, *, clock: Callable[[], float], factory: MetricFactory | None = None) -> None:
        factory = factory or MetricFactory()
        self._names = BoundedLabels(top, clock=clock)
        self._requests = factory.counter(BY_ADAPTER)
        self._device_s = factory.counter(DEVICE_BY_ADAPTER)

    def drawn(self, request: GenerationRequest, result: GenerationResult) -> None:
        """Count a request that got its images; it counts for each of its adapters."""
        for use in request.adapters:
            name = self._names.label(use.spec.id) if request.hub_token is None else PRIVATE
            labels = {"base": request.base_id, "adapter": name}
            self._requests.inc(1, labels)
            if result.device_s > 0:
                self._device_s.inc(result.device_s, labels)


class IngressMetrics:
    """Metrics of one ingress replica."""

    def __init__(self, factory: MetricFactory | None = None) -> None:
        factory = factory or MetricFactory()
        self._requests = factory.counter(REQUESTS)
        self._refusals = factory.counter(REFUSALS)
        self._retries = factory.counter(RETRIES)
        self._start_waits = factory.counter(START_WAITS)
        self._aliases = factory.gauge(ALIASES)
        self._access = factory.counter(ACCESS)

    def answered(self, *, route: str, status: int, base_id: str | None) -> None:
        """Count a reply; `route` is the template, not the path; `base_id` is None if unknown."""
        self._requests.inc(1, {"route": route, "status": str(status), "base": base_id or "none"})

    def refused(self, code: str) -> None:
        """Count an error by its stable code."""
        self._refusals.inc(1, {"code": code})

    def start_waited(self, base_id: str, outcome: str) -> None:
        """Count a request that found no replica: one "started" for it, it was "refused", or the base has "failed"."""
        self._start_waits.inc(1, {"base": base_id, "outcome": outcome})

    def aliases_known(self, count: int) -> None:
        """Report how many aliases this replica knows."""
        self._aliases.set(count, {})

    def access_checked(self, outcome: str) -> None:
        """Count a check of a caller's access: "ok", or the code of its refusal."""
        self._access.inc(1, {"outcome": outcome})

    def retried(self, base_id: str, reason: str) -> None:
        """Count a request that goes to another replica, by the reason its first one was lost."""
        self._retries.inc(1, {"base": base_id, "reason": reason})


class RouterMetrics:
    """Metrics of the router of one base, in each process that routes."""

    def __init__(self, base_id: str, factory: MetricFactory | None = None) -> None:
        self._base = {"base": base_id}
        self._routed = (factory or MetricFactory()).counter(ROUTED)

    def routed(self, tier: str) -> None:
        """Count a request that a replica accepted, by the slowest tier of its adapters there."""
        self._routed.inc(1, {**self._base, "tier": tier})


class ReplicaMetrics:
    """Metrics of one replica of a base."""

    def __init__(
        self, base_id: str, factory: MetricFactory | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        factory = factory or MetricFactory()
        self._base = {"base": base_id}
        self._suspended = factory.histogram(SUSPENDED)
        self._slowdown = factory.histogram(SLOWDOWN)
        self._changes = factory.counter(CHANGES)
        self._changing = factory.counter(CHANGING)
        self._changes_reported, self._changing_reported = 0, 0.0
        self._share = factory.counter(SHARE)
        self._share_images = factory.counter(SHARE_IMAGES)
        self._shares = BoundedLabels(SHARES_TOLD, clock=clock)
        self._queue = factory.histogram(QUEUE)
        self._fetch = factory.histogram(FETCH)
        self._swap = factory.histogram(SWAP)
        self._denoise = factory.histogram(DENOISE)
        self._decode = factory.histogram(DECODE)
        self._batch = factory.histogram(BATCH)
        self._lookups = factory.counter(LOOKUPS)
        self._files = factory.counter(FILES)
        self._base_bytes = factory.counter(BASE_BYTES)
        self._evictions = factory.counter(EVICTIONS)
        self._resident = factory.gauge(RESIDENT)
        self._cancelled = factory.counter(CANCELLED)
        self._evictions_reported = 0
        self._self_checks = factory.counter(SELF_CHECKS)
        self._quarantined = factory.gauge(QUARANTINED)
        self._shortages = factory.counter(SHORTAGES)
        self._shortages_reported = {"recovered": 0, "refused": 0}
        self._sound_reported = 0
        self._is_mismatch_reported = False
        self._backlog = factory.gauge(BACKLOG)
        self._predicted = factory.counter(PREDICTED)
        self._busy = factory.counter(BUSY)
        self._predicted_reported = self._busy_reported = 0.0
        self._start = factory.gauge(START)
        self._warmed = factory.counter(WARMED)

    def served(self, timings: Timings, *, batch_size: int) -> None:
        """Report the time of each stage of one finished request."""
        self._queue.observe(timings.queue_ms / 1000, self._base)
        self._fetch.observe(timings.fetch_ms / 1000, self._base)
        self._swap.observe(timings.swap_ms / 1000, self._base)
        self._denoise.observe(timings.denoise_ms / 1000, self._base)
        self._decode.observe(timings.decode_ms / 1000, self._base)
        self._batch.observe(batch_size, self._base)
        self._suspended.observe(timings.suspended_ms / 1000, self._base)
        device_ms = timings.swap_ms + timings.denoise_ms + timings.decode_ms
        if device_ms > 0:
            self._slowdown.observe((timings.queue_ms + timings.suspended_ms + device_ms) / device_ms, self._base)

    def shared(self, share: str, device_s: float, *, images: int) -> None:
        """Count images of a caller, told by a hash, and their device time; callers without a key are "none"."""
        labels = {**self._base, "share": self._shares.label(share) if share else "none"}
        self._share.inc(device_s, labels)
        self._share_images.inc(images, labels)

    def changed(self, *, changes: int, changing_s: float) -> None:
        """Report how often the adapters in the weights changed since the start, and how long that took."""
        if changes > self._changes_reported:
            self._changes.inc(changes - self._changes_reported, self._base)
            self._changes_reported = changes
        if changing_s > self._changing_reported:
            self._changing.inc(changing_s - self._changing_reported, self._base)
            self._changing_reported = changing_s

    def cancelled(self, stage: str) -> None:
        """Count a cancelled request, by its stage "fetching", "queued" or "running"."""
        self._cancelled.inc(1, {**self._base, "stage": stage})

    def adapter_found(self, tier: str) -> None:
        """Count one leased adapter by the tier where it was found."""
        self._lookups.inc(1, {**self._base, "tier": tier})

    def file_fetched(self, source: str) -> None:
        """Count one file that was copied to this node, from the "hub", a "store" or a "peer"."""
        self._files.inc(1, {**self._base, "source": source})

    def base_fetched(self, came: Mapping[str, int]) -> None:
        """Count the bytes of the base's files that a start found missing, by where they came from."""
        for source, size_bytes in came.items():
            self._base_bytes.inc(size_bytes, {**self._base, "source": source})

    def host_tier(self, *, used_bytes: int, evictions: int) -> None:
        """Report the state of the host tier; `evictions` counts since the replica's start."""
        self._resident.set(used_bytes, self._base)
        # Ray's counters refuse an increment of zero.
        if evictions > self._evictions_reported:
            self._evictions.inc(evictions - self._evictions_reported, self._base)
            self._evictions_reported = evictions

    def worked(self, *, backlog_s: float, predicted_s: float, busy_s: float) -> None:
        """Report the backlog, and the predicted and measured time of all passes since the start."""
        self._backlog.set(backlog_s, self._base)
        if predicted_s > self._predicted_reported:
            self._predicted.inc(predicted_s - self._predicted_reported, self._base)
            self._predicted_reported = predicted_s
        if busy_s > self._busy_reported:
            self._busy.inc(busy_s - self._busy_reported, self._base)
            self._busy_reported = busy_s

    def started(self, *, start_s: float, warmed: int) -> None:
        """Report how long this replica took to start, and how many adapters it fetched meanwhile."""
        self._start.set(start_s, self._base)
        if warmed:
            self._warmed.inc(warmed, self._base)

    def quarantined(self, held: int) -> None:
        """Report how many adapter sets are in quarantine."""
        self._quarantined.set(held, self._base)

    def self_checked(self, *, sound: int, is_corrupt: bool) -> None:
        """Report the clean checks, counted since the start, and whether one found a difference."""
        if sound > self._sound_reported:
            self._self_checks.inc(sound - self._sound_reported, {**self._base, "outcome": "ok"})
            self._sound_reported = sound
        if is_corrupt and not self._is_mismatch_reported:
            self._self_checks.inc(1, {**self._base, "outcome": "mismatch"})
            self._is_mismatch_reported = True

    def out_of_memory(self, *, recovered: int, refused: int) -> None:
        """Report how often memory ran out, counted since the start, by the outcome of the second try."""
        for outcome, count in (("recovered", recovered), ("refused", refused)):
            if count > self._shortages_reported[outcome]:
                self._shortages.inc(count - self._shortages_reported[outcome], {**self._base, "outcome": outcome})
                self._shortages_reported[outcome] = count
