"""A collector of traces on loopback: takes OTLP over HTTP, as the real ones do, and remembers the spans."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue


@dataclass(frozen=True)
class Collected:
    """One span as it came in; ids in hex, `parent` empty for a root, times in nanoseconds since 1970."""

    name: str
    trace: str
    id: str
    parent: str
    began: int
    ended: int
    facts: dict[str, Any]
    is_error: bool
    part: str


class Collector:
    """Takes spans from any process of this machine. `status` is what it answers, so that it can refuse."""

    def __init__(self) -> None:
        self.status = 200
        self.spans: list[Collected] = []
        self.bodies: list[bytes] = []
        self._changed = threading.Condition()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                body = self.rfile.read(int(self.headers["content-length"]))
                # Before the answer: whoever sent may look as soon as it has that.
                if collector.status == 200:
                    collector.take(body)
                self.send_response(collector.status)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                """Stay silent."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Collector:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def take(self, body: bytes) -> None:
        with self._changed:
            self.bodies.append(body)
            self.spans += _spans_of(body)
            self._changed.notify_all()

    def of_trace(self, trace: str, *, until: Callable[[list[Collected]], bool], timeout_s: float) -> list[Collected]:
        """Return the spans of one trace, once they are what is waited for."""

        def here() -> list[Collected]:
            return [span for span in self.spans if span.trace == trace]

        with self._changed:
            assert self._changed.wait_for(lambda: until(here()), timeout_s), sorted(span.name for span in here())
            return here()


def _spans_of(body: bytes) -> list[Collected]:
    message = ExportTraceServiceRequest.FromString(body)
    return [
        Collected(
            name=span.name,
            trace=span.trace_id.hex(),
            id=span.span_id.hex(),
            parent=span.parent_span_id.hex(),
            began=span.start_time_unix_nano,
            ended=span.end_time_unix_nano,
            facts={fact.key: _value(fact.value) for fact in span.attributes},
            is_error=span.status.code == 2,
            part=next(_value(fact.value) for fact in group.resource.attributes if fact.key == "loraplex.part"),
        )
        for group in message.resource_spans
        for scope in group.scope_spans
        for span in scope.spans
    ]


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(one) for one in value.array_value.values]
    return getattr(value, kind) if kind is not None else None
