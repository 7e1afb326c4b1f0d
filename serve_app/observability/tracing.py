"""Traces: what each part of a request took, across processes, as OpenTelemetry spans.

Owns the tracer of a process, what its spans are called and what they may say: bases, steps and sizes, the ids of
adapters that anybody may read; never prompts, tokens or keys. Until `set_up_tracing` is called with an endpoint, and
for requests that are not sampled, every function here returns at once, and the SDK of OpenTelemetry is not loaded.
Must not know Ray or HTTP servers.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from http import HTTPStatus
from importlib.util import find_spec
from typing import TYPE_CHECKING

from serve_app.config import TracingSettings
from serve_app.core import GenerationRequest, TraceContext
from serve_app.errors import LoraplexError
from serve_app.observability.bounded_labels import PRIVATE

if TYPE_CHECKING:
    from opentelemetry import trace as otel
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider

log = logging.getLogger(__name__)

SERVICE = "loraplex"
# The spans that may be lost when a process dies.
EXPORT_EVERY_MS = 1000
EXPORT_TIMEOUT_S = 5.0
_HEADERS = ("traceparent", "tracestate")
_NANOSECONDS = 1_000_000_000

Fact = str | bool | int | float | Sequence[str]


class TracingUnavailable(Exception):
    """Tracing is configured, but its packages are not installed."""


def check_tracing(settings: TracingSettings) -> None:
    """Refuse a configuration with tracing if its packages are missing.

    Raises:
        TracingUnavailable: the packages of the extra `tracing` are not installed.
    """
    if settings.endpoint is not None and not _is_installed("opentelemetry.exporter.otlp.proto.http"):
        raise TracingUnavailable(
            "tracing.endpoint is set, but OpenTelemetry's exporter is not installed: pip install 'loraplex[tracing]'"
        )


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # a package above it is missing
        return False


class Span:
    """One part of a traced request; without an OpenTelemetry span, every method does nothing."""

    def __init__(self, span: otel.Span | None = None) -> None:
        self._span = span

    @property
    def context(self) -> TraceContext | None:
        """The parent of further spans, in this or another process."""
        if self._span is None:
            return None
        from opentelemetry.trace import set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(carrier, set_span_in_context(self._span))
        return TraceContext(carrier["traceparent"], carrier.get("tracestate", ""))

    def note(self, **facts: Fact) -> None:
        """Add attributes; names become `loraplex.<name>`."""
        if self._span is not None:
            self._span.set_attributes(_attributes(facts))

    def describe(self, request: GenerationRequest) -> None:
        """Add the attributes of a request."""
        if self._span is not None:
            self.note(**_facts_of(request))

    def fail(self, error: BaseException) -> None:
        """Mark the span as failed, with the error's code only: its message may name a private adapter."""
        if self._span is None:
            return
        if isinstance(error, (asyncio.CancelledError, GeneratorExit)):
            self.note(cancelled=True)
            return
        from opentelemetry.trace import Status, StatusCode

        self._span.set_attribute("error.type", error.code if isinstance(error, LoraplexError) else type(error).__name__)
        self._span.set_status(Status(StatusCode.ERROR))

    def answer(self, *, route: str, status: int, base_id: str | None) -> None:
        """Add the HTTP status and route of the reply."""
        if self._span is None:
            return
        self._span.set_attributes({"http.route": route, "http.response.status_code": status})
        if base_id is not None:
            self.note(base=base_id)
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            from opentelemetry.trace import Status, StatusCode

            self._span.set_status(Status(StatusCode.ERROR))

    def refuse(self, error: LoraplexError) -> None:
        """Record that the reply is an error; the span fails if the error is the service's own."""
        self.note(code=error.code)
        if error.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            self.fail(error)

    def carried_by(self, request: GenerationRequest) -> GenerationRequest:
        """Return the request with this span as the parent of further spans."""
        return request if self._span is None else replace(request, trace=self.context)


NOTHING = Span()
_request: ContextVar[Span] = ContextVar("request_span", default=NOTHING)


@dataclass(frozen=True, slots=True)
class _Tracer:
    provider: TracerProvider
    tracer: otel.Tracer


_active: _Tracer | None = None


def set_up_tracing(
    settings: TracingSettings, *, part: str, on_sent: Callable[[int, bool], None] = lambda spans, is_sent: None
) -> None:
    """Send this process's spans to the configured collector, if there is one.

    `part` names the process's part of the service. `on_sent` is called after each export, from another thread, with the
    number of spans and whether the collector accepted them.

    Raises:
        TracingUnavailable: the packages of the extra `tracing` are not installed.
    """
    global _active
    check_tracing(settings)
    if settings.endpoint is None:
        return
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

    from serve_app.observability.trace_export import CollectorExporter

    close_tracing()
    provider = TracerProvider(
        resource=Resource.create({"service.name": SERVICE, "loraplex.part": part}),
        sampler=ParentBased(TraceIdRatioBased(settings.sample)),
    )
    exporter = CollectorExporter(settings.endpoint, timeout_s=EXPORT_TIMEOUT_S, on_sent=on_sent)
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=EXPORT_EVERY_MS))
    # Not the process's global provider, which Ray sets.
    _active = _Tracer(provider, provider.get_tracer(SERVICE))


def close_tracing() -> None:
    """Send the remaining spans and stop tracing."""
    global _active
    active, _active = _active, None
    if active is not None:
        active.provider.shutdown()


@contextmanager
def tracing_request(headers: Mapping[str, str], **facts: Fact) -> Generator[None]:
    """Trace one incoming request, in its caller's trace or in a new one if it is sampled."""
    if _active is None:
        yield
        return
    from opentelemetry.trace import SpanKind

    context = _parsed({name: headers[name] for name in _HEADERS if name in headers})
    started = _active.tracer.start_span("request", context, SpanKind.SERVER, _attributes(facts))
    if not started.is_recording():
        yield
        return
    span = Span(started)
    token = _request.set(span)
    try:
        yield
    except BaseException as error:
        span.fail(error)
        raise
    finally:
        _request.reset(token)
        started.end()


def request_span() -> Span:
    """Return the span of the present request."""
    return _request.get()


def answered(*, route: str, status: int, base_id: str | None) -> None:
    """Record the reply of the present request; `route` is the template."""
    _request.get().answer(route=route, status=status, base_id=base_id)


@contextmanager
def span(name: str, parent: TraceContext | None, **facts: Fact) -> Generator[Span]:
    """Trace the block as a child of `parent`; errors and cancellations are recorded and raised."""
    active = _active
    if active is None or parent is None:
        yield NOTHING
        return
    started = active.tracer.start_span(name, _below(parent), attributes=_attributes(facts))
    own = Span(started)
    try:
        yield own
    except BaseException as error:
        own.fail(error)
        raise
    finally:
        started.end()


def record(
    name: str,
    parent: TraceContext | None,
    *,
    began_ago_s: float,
    lasted_s: float,
    error: BaseException | None = None,
    **facts: Fact,
) -> None:
    """Record a span that began `began_ago_s` ago."""
    active = _active
    if active is None or parent is None:
        return
    began = time.time_ns() - round(began_ago_s * _NANOSECONDS)
    done = active.tracer.start_span(name, _below(parent), attributes=_attributes(facts), start_time=began)
    if error is not None:
        Span(done).fail(error)
    done.end(began + round(max(lasted_s, 0.0) * _NANOSECONDS))


def _facts_of(request: GenerationRequest) -> dict[str, Fact]:
    """Return the attributes of a request; private adapters are not named."""
    ids = [use.spec.id if request.hub_token is None else PRIVATE for use in request.adapters]
    return {
        "request_id": request.request_id,
        "base": request.base_id,
        "adapters": ids,
        "steps": request.planned_steps,
        "pixels": request.width * request.height * request.num_images,
    }


def _below(parent: TraceContext) -> Context:
    return _parsed({"traceparent": parent.traceparent, "tracestate": parent.tracestate})


def _parsed(headers: dict[str, str]) -> Context:
    """Return the context in W3C headers; malformed ones give an empty context."""
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    # An empty context, so that other traces of this process are not the parent.
    return TraceContextTextMapPropagator().extract(headers, Context())


def _attributes(facts: Mapping[str, Fact]) -> dict[str, Fact]:
    return {f"loraplex.{name}": fact for name, fact in facts.items()}
