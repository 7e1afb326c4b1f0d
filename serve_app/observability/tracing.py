"""Traces: what each part of a request took, across processes, for a collector of OpenTelemetry.

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
# What a process that ends may take with it.
EXPORT_EVERY_MS = 1000
EXPORT_TIMEOUT_S = 5.0
_HEADERS = ("traceparent", "tracestate")
_NANOSECONDS = 1_000_000_000

Fact = str | bool | int | float | Sequence[str]


class TracingUnavailable(Exception):
    """Traces are asked for, and what sends them is not installed."""


def check_tracing(settings: TracingSettings) -> None:
    """Refuse a configuration that asks for traces where they cannot be sent.

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
    """One part of a traced request, or of one that is not traced, which then tells nothing to anybody."""

    def __init__(self, span: otel.Span | None = None) -> None:
        self._span = span

    @property
    def context(self) -> TraceContext | None:
        """What makes others its children, in whichever process."""
        if self._span is None:
            return None
        from opentelemetry.trace import set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(carrier, set_span_in_context(self._span))
        return TraceContext(carrier["traceparent"], carrier.get("tracestate", ""))

    def note(self, **facts: Fact) -> None:
        """Say more about it; names become `loraplex.<name>`."""
        if self._span is not None:
            self._span.set_attributes(_attributes(facts))

    def describe(self, request: GenerationRequest) -> None:
        """Say what is generated."""
        if self._span is not None:
            self.note(**_facts_of(request))

    def fail(self, error: BaseException) -> None:
        """Say that it ended badly, by the error's code alone: sentences may name what is private."""
        if self._span is None:
            return
        if isinstance(error, (asyncio.CancelledError, GeneratorExit)):
            self.note(cancelled=True)
            return
        from opentelemetry.trace import Status, StatusCode

        self._span.set_attribute("error.type", error.code if isinstance(error, LoraplexError) else type(error).__name__)
        self._span.set_status(Status(StatusCode.ERROR))

    def answer(self, *, route: str, status: int, base_id: str | None) -> None:
        """Say how it was answered over HTTP."""
        if self._span is None:
            return
        self._span.set_attributes({"http.route": route, "http.response.status_code": status})
        if base_id is not None:
            self.note(base=base_id)
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            from opentelemetry.trace import Status, StatusCode

            self._span.set_status(Status(StatusCode.ERROR))

    def refuse(self, error: LoraplexError) -> None:
        """Say that the request is answered with an error, which is a failure where it is ours."""
        self.note(code=error.code)
        if error.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            self.fail(error)

    def carried_by(self, request: GenerationRequest) -> GenerationRequest:
        """Return the request as the cause of further spans below this one."""
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

    `part` says which part of the service the process is. `on_sent` is told of each delivery, from a thread of its own:
    how many spans, and whether the collector took them.

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
    # Not the process's global provider: that one is Ray's to set.
    _active = _Tracer(provider, provider.get_tracer(SERVICE))


def close_tracing() -> None:
    """Send what has not been sent yet, and trace no more."""
    global _active
    active, _active = _active, None
    if active is not None:
        active.provider.shutdown()


@contextmanager
def tracing_request(headers: Mapping[str, str], **facts: Fact) -> Generator[None]:
    """Trace one request that came in: as part of its caller's trace, else of one of its own if it is sampled."""
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
    """Return the span of the request that is being served here."""
    return _request.get()


def answered(*, route: str, status: int, base_id: str | None) -> None:
    """Say how the request that is being served here is answered; `route` is the template."""
    _request.get().answer(route=route, status=status, base_id=base_id)


@contextmanager
def span(name: str, parent: TraceContext | None, **facts: Fact) -> Generator[Span]:
    """Trace what is done inside, below `parent`; errors and cancellations are noted and go on."""
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
    """Trace what was done already, `began_ago_s` before now."""
    active = _active
    if active is None or parent is None:
        return
    began = time.time_ns() - round(began_ago_s * _NANOSECONDS)
    done = active.tracer.start_span(name, _below(parent), attributes=_attributes(facts), start_time=began)
    if error is not None:
        Span(done).fail(error)
    done.end(began + round(max(lasted_s, 0.0) * _NANOSECONDS))


def _facts_of(request: GenerationRequest) -> dict[str, Fact]:
    """Return what a trace may say of a request; of adapters that not everybody may read, only that there are such."""
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
    """Return what W3C's headers say; what is malformed says nothing."""
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    # Into an empty context: whatever else this process may trace is not its parent.
    return TraceContextTextMapPropagator().extract(headers, Context())


def _attributes(facts: Mapping[str, Fact]) -> dict[str, Fact]:
    return {f"loraplex.{name}": fact for name, fact in facts.items()}
