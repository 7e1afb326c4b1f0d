"""The way of spans to the collector; loaded only where traces are on.

Owns what is said when the collector does not answer: one line when that begins and one when it ends, without the
collector's address. Spans that it did not take are lost; requests never wait for it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

log = logging.getLogger(__name__)

PATH = "/v1/traces"


class CollectorExporter(SpanExporter):
    """Sends spans by OTLP over HTTP; called by the SDK's own thread."""

    def __init__(self, endpoint: str, *, timeout_s: float, on_sent: Callable[[int, bool], None]) -> None:
        # It would log every failed attempt, with the collector's address.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        self._sender = OTLPSpanExporter(endpoint=endpoint + PATH, timeout=timeout_s)
        self._on_sent = on_sent
        self._is_failing = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send some spans."""
        result = self._sender.export(spans)
        is_sent = result is SpanExportResult.SUCCESS
        self._on_sent(len(spans), is_sent)
        if not is_sent and not self._is_failing:
            log.warning("the collector of tracing.endpoint does not take spans; they are lost until it does")
        if is_sent and self._is_failing:
            log.info("the collector of tracing.endpoint takes spans again")
        self._is_failing = not is_sent
        return result

    def shutdown(self) -> None:
        """Send no more."""
        self._sender.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        """Return at once: nothing is kept here."""
        return True
