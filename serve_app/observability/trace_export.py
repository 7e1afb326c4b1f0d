"""Export of spans to the collector; imported only if tracing is on.

Logs one line when the collector stops accepting spans and one when it accepts them again, without its address. Spans
that it did not accept are lost; requests never wait for it.
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
    """Sends spans as OTLP over HTTP; called by the SDK's own thread."""

    def __init__(self, endpoint: str, *, timeout_s: float, on_sent: Callable[[int, bool], None]) -> None:
        # The SDK logs every failed attempt with the collector's address.
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
            log.warning("the collector of tracing.endpoint does not accept spans; they are lost until it does")
        if is_sent and self._is_failing:
            log.info("the collector of tracing.endpoint accepts spans again")
        self._is_failing = not is_sent
        return result

    def shutdown(self) -> None:
        """Stop sending."""
        self._sender.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        """Return immediately: nothing is buffered here."""
        return True
