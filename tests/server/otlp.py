"""A collector of OpenTelemetry spans: takes what OTLP exporters send over gRPC, and keeps it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest


@dataclass(frozen=True)
class Event:
    """Of a span."""

    name: str
    attributes: dict[str, Any]


@dataclass(frozen=True)
class Span:
    """One that ended."""

    name: str
    span_id: bytes
    parent: bytes
    attributes: dict[str, Any]
    events: list[Event]


@dataclass
class Collector:
    """What came so far."""

    port: int = 0
    spans: list[Span] = field(default_factory=list)

    def request(self, rid: str) -> Span | None:
        """The span of a whole request."""
        return next((s for s in self.spans if s.attributes.get("rid") == rid), None)

    def under(self, span: Span) -> list[Span]:
        """Those below it, at any depth."""
        below = [one for one in self.spans if one.parent == span.span_id]
        return [*below, *(deeper for one in below for deeper in self.under(one))]

    def wait(self, seconds: float, done: Callable[[], object]) -> None:
        """Until something is true: exporters send what ended a moment later."""
        until = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < until, [span.name for span in self.spans][-40:]
            time.sleep(0.1)


def require() -> None:
    """Skip where the packages of SGLang's extra `tracing` are not installed."""
    reason = "OpenTelemetry's exporters are not installed: pip install 'sglang[tracing]'"
    pytest.importorskip("opentelemetry.sdk.trace", reason=reason)
    pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc.trace_exporter", reason=reason)
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http.trace_exporter", reason=reason)


def _value(value: Any) -> Any:
    return getattr(value, value.WhichOneof("value"))


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


@contextmanager
def collecting() -> Iterator[Collector]:
    """Listen on a free port of this machine."""
    import grpc  # type: ignore[import-untyped]
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

    collector = Collector()

    class Service(trace_service_pb2_grpc.TraceServiceServicer):  # type: ignore[misc]
        def Export(self, request: Any, context: Any) -> Any:
            for resource in request.resource_spans:
                for scope in resource.scope_spans:
                    collector.spans += [
                        Span(
                            span.name,
                            span.span_id,
                            span.parent_span_id,
                            _attributes(span.attributes),
                            [Event(e.name, _attributes(e.attributes)) for e in span.events],
                        )
                        for span in scope.spans
                    ]
            return trace_service_pb2.ExportTraceServiceResponse()

    server = grpc.server(futures.ThreadPoolExecutor(max_workers=2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Service(), server)
    collector.port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield collector
    finally:
        server.stop(None)
