"""A device that is beyond repair, and one that hangs: whatever was accepted goes elsewhere at once."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from serve_app.deployments.replica.health import diagnose
from serve_app.engine.weights.fused import FusedWeights
from serve_app.engine.weights.integrity import IntegrityChecker, ThrottledChecker
from serve_app.engine.worker.device_health import DeviceHealth
from serve_app.engine.worker.worker import EngineWorker
from serve_app.errors import InternalError, ReplicaLost
from tests.engine_cases import on_steps, request, wrap
from tests.tiny import tiny_pipeline

WAIT_S = 60.0


class Bench:
    """A worker on a tiny base, whose denoiser can be made to fail or to hang; its clock is the test's."""

    def __init__(self) -> None:
        self.live: Any = tiny_pipeline("sd15")
        pipeline = wrap(self.live, schedulers=("DDIMScheduler",))
        self.now_s = 0.0
        self.worker = EngineWorker(
            pipeline, FusedWeights(pipeline.components), max_batch_images=2, torch_threads=1, clock=lambda: self.now_s
        )

    def fail_with(self, error: Exception) -> None:
        def fail(*_: Any) -> None:
            raise error

        self.live.unet.register_forward_pre_hook(fail)


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.mark.parametrize(
    "said", ["an illegal memory access was encountered", "device-side assert triggered", "uncorrectable ECC error"]
)
def test_a_device_beyond_repair_is_reported_at_once_and_all_its_requests_go_elsewhere(bench: Bench, said: str) -> None:
    opened, reached = threading.Event(), threading.Event()

    def hold(step: int, steps: int) -> None:
        reached.set()
        assert opened.wait(WAIT_S)

    held = bench.worker.submit(request(width=128, steps=1), (), on_event=on_steps(hold))
    assert reached.wait(WAIT_S)
    bench.fail_with(torch.AcceleratorError(f"CUDA error: {said}"))
    jobs = [bench.worker.submit(request(prompt=prompt), ()) for prompt in ("a cat", "a dog")]
    jobs.append(bench.worker.submit(request(height=128), ()))
    opened.set()
    assert held.future.result(WAIT_S).images
    for job in jobs:
        with pytest.raises(ReplicaLost) as caught:
            job.future.result(WAIT_S)
        assert caught.value.reason == "device"
    bench.worker.close()
    state = bench.worker.snapshot()
    assert (state.is_lost, state.failed_batches) == (True, 1)
    found = diagnose(state, "tiny/base")
    assert found is not None
    assert (found.is_fatal, found.can_serve) == (True, False)
    assert "beyond repair" in found.message
    with pytest.raises(ReplicaLost):
        bench.worker.submit(request(), ())


def test_any_other_failure_is_the_request_s_alone(bench: Bench) -> None:
    bench.fail_with(RuntimeError("shapes do not match"))
    with pytest.raises(InternalError):
        bench.worker.submit(request(), ()).future.result(WAIT_S)
    assert not bench.worker.snapshot().is_lost
    bench.worker.close()


def test_a_device_that_hangs_is_noticed_and_its_requests_go_elsewhere_while_it_hangs(bench: Bench) -> None:
    opened, reached = threading.Event(), threading.Event()

    def hang(*_: Any) -> None:
        reached.set()
        assert opened.wait(WAIT_S)

    bench.live.unet.register_forward_pre_hook(hang)
    running = bench.worker.submit(request(), ())
    assert reached.wait(WAIT_S)
    waiting = bench.worker.submit(request(height=128), ())
    bench.now_s += 100.0
    state = bench.worker.snapshot()
    assert state.stalled_s == 100.0
    assert diagnose(state, "tiny/base", stall_timeout_s=101.0) is None
    found = diagnose(state, "tiny/base", stall_timeout_s=99.0)
    assert found is not None
    assert (found.reason, found.is_fatal) == ("stalled", True)
    bench.worker.fail_all(found.reason)
    for job in (running, waiting):
        with pytest.raises(ReplicaLost) as caught:
            job.future.result(0)
        assert caught.value.reason == "stalled"
    bench.worker.close()  # waits for nobody who hangs
    opened.set()


def test_a_worker_that_has_nothing_to_do_does_not_hang(bench: Bench) -> None:
    bench.worker.submit(request(steps=1), ()).future.result(WAIT_S)
    bench.now_s += 10_000.0
    assert bench.worker.snapshot().stalled_s == 0.0
    opened, reached = threading.Event(), threading.Event()

    def hold(step: int, steps: int) -> None:
        reached.set()
        assert opened.wait(WAIT_S)

    job = bench.worker.submit(request(steps=1), (), on_event=on_steps(hold))
    assert reached.wait(WAIT_S)
    assert bench.worker.snapshot().stalled_s == 0.0
    opened.set()
    job.future.result(WAIT_S)
    bench.worker.close()


class _Failing(IntegrityChecker):
    """A check whose device fails with an error."""

    def __init__(self, error: Exception) -> None:
        super().__init__({"it": torch.zeros(8)})
        self.error = error

    def check_next(self) -> None:
        raise self.error


def test_a_check_of_the_weights_without_room_is_put_off_and_one_on_a_lost_device_is_a_verdict() -> None:
    cpu = torch.device("cpu")
    starved = DeviceHealth("tiny/base", cpu, ThrottledChecker(_Failing(torch.OutOfMemoryError("CUDA out of memory"))))
    starved.check_slice()
    assert starved.is_healthy
    lost = DeviceHealth(
        "tiny/base", cpu, ThrottledChecker(_Failing(torch.AcceleratorError("CUDA error: uncorrectable ECC error")))
    )
    lost.check_slice()
    assert (lost.is_healthy, lost.failure_reason) == (False, "device")
    strange = DeviceHealth("tiny/base", cpu, ThrottledChecker(_Failing(RuntimeError("shapes"))))
    with pytest.raises(RuntimeError, match="shapes"):
        strange.check_slice()
