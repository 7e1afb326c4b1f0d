"""What the device thread tells of its passes, to a collector and to the log."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from serve_app.config import TracingSettings
from serve_app.core import TraceContext, WallClockDeadline
from serve_app.engine.weights.fused import FusedWeights
from serve_app.engine.worker.worker import EngineWorker
from serve_app.errors import DeadlineExceeded, LoraplexError
from serve_app.observability.tracing import close_tracing, set_up_tracing
from tests.collector import Collected, Collector
from tests.engine_cases import on_steps, request, wrap
from tests.tiny import tiny_pipeline

WAIT_S = 60.0
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CONTEXT = TraceContext(f"00-{TRACE}-{PARENT}-01")


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        set_up_tracing(TracingSettings(endpoint=collector.endpoint), part="test")
        yield collector
        close_tracing()


class Device:
    """A worker on a tiny base, whose clocks can be put forward."""

    def __init__(self) -> None:
        self.live = tiny_pipeline("sd15")
        self.skipped_s = 0.0
        pipeline = wrap(self.live, schedulers=("DDIMScheduler",))
        self.worker = EngineWorker(
            pipeline,
            FusedWeights(pipeline.components),
            max_batch_images=1,
            torch_threads=1,
            clock=lambda: time.perf_counter() + self.skipped_s,
            wall_clock=self.wall_clock_s,
        )

    def wall_clock_s(self) -> float:
        return time.time() + self.skipped_s


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    device = Device()
    yield device
    device.worker.close()


def sent(collector: Collector) -> dict[str, Collected]:
    close_tracing()
    return {one.name: one for one in collector.spans}


def test_a_request_s_passage_is_traced_from_the_queue_to_its_pixels(
    device: Device, collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    asked = replace(request(steps=2), trace=CONTEXT)
    with caplog.at_level(logging.INFO):
        device.worker.submit(asked, ()).future.result(WAIT_S)
    spans = sent(collector)
    assert set(spans) == {"queue", "swap", "denoise", "decode"}
    assert {(one.trace, one.parent) for one in spans.values()} == {(TRACE, PARENT)}
    order = [spans[name] for name in ("queue", "swap", "denoise", "decode")]
    # A millisecond of tolerance: each is reckoned back from the end of the pass by a clock of its own.
    assert all(later.began - earlier.ended > -1_000_000 for earlier, later in itertools.pairwise(order))
    facts = {"loraplex.steps": 2, "loraplex.images": 1, "loraplex.pixels": 64 * 64, "loraplex.suspended_ms": 0}
    assert spans["denoise"].facts == facts
    (line,) = [record for record in caplog.records if "begins on the device" in record.getMessage()]
    assert asked.request_id in line.getMessage()
    assert line.__dict__["request_id"] == asked.request_id


def test_a_pass_that_fails_is_a_span_that_says_so(device: Device, collector: Collector) -> None:
    def break_down(*_: Any) -> None:
        raise RuntimeError("a device that is broken")

    hook = device.live.unet.register_forward_hook(break_down)
    with pytest.raises(LoraplexError):
        device.worker.submit(replace(request(), trace=CONTEXT), ()).future.result(WAIT_S)
    hook.remove()
    spans = sent(collector)
    assert set(spans) == {"queue", "pass"}
    assert spans["pass"].is_error
    assert spans["pass"].facts["error.type"] == "internal"


def test_a_request_that_runs_out_of_time_in_the_queue_is_a_span_that_says_so(
    device: Device, collector: Collector
) -> None:
    reached, opened = threading.Event(), threading.Event()

    def stop(*_: int) -> None:
        reached.set()
        assert opened.wait(WAIT_S)

    held = device.worker.submit(request(steps=1), (), on_event=on_steps(stop))
    assert reached.wait(WAIT_S)
    due = WallClockDeadline(device.wall_clock_s() + 1000.0, limit_s=1000.0)
    late = device.worker.submit(replace(request(), trace=CONTEXT, due=due), ())
    device.skipped_s += 1001.0
    opened.set()
    with pytest.raises(DeadlineExceeded):
        late.future.result(WAIT_S)
    held.future.result(WAIT_S)
    spans = sent(collector)
    assert set(spans) == {"queue"}
    assert spans["queue"].facts["error.type"] == "deadline_exceeded"
    assert spans["queue"].ended - spans["queue"].began > 1000e9
