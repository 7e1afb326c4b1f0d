"""Loaded weights that change in memory are noticed, and the worker serves nothing more from them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Literal

import pytest
import torch

from serve_app.deployments.replica.health import diagnose
from serve_app.engine.adapters.deltas import Coverage, LowRank, ParsedAdapter, bytes_of
from serve_app.engine.drawing.pipeline import BasePipeline
from serve_app.engine.weights.fused import FusedWeights
from serve_app.engine.weights.integrity import IntegrityChecker, ThrottledChecker
from serve_app.engine.worker.state import WorkerState
from serve_app.engine.worker.worker import EngineWorker
from serve_app.errors import InternalError, ReplicaLost
from tests.engine_cases import on_steps, parsed_adapter, request, use_of, wrap
from tests.tiny import tiny_pipeline

WAIT_S = 60.0


class Bench:
    """A worker that checks itself, on a tiny base; with `rest_s` the pause after each round."""

    def __init__(
        self, *, rest_s: float, slice_bytes: int = 1 << 20, base_weights: Literal["device", "host"] = "device"
    ) -> None:
        self.pipeline: BasePipeline = wrap(tiny_pipeline("sd15"), schedulers=("DDIMScheduler",))
        self.weights = FusedWeights(self.pipeline.components, base_weights=base_weights)
        watched, is_modified = self.weights.checksummed_tensors, self.weights.is_modified
        check = ThrottledChecker(
            IntegrityChecker(watched, slice_bytes=slice_bytes, is_modified=is_modified), rest_s=rest_s
        )
        self.worker = EngineWorker(self.pipeline, self.weights, max_batch_images=2, torch_threads=1, self_check=check)

    def flip_a_bit(self) -> None:
        """Change the lowest bit of one loaded value, as a fault of the memory would."""
        bytes_of(self.weights.base_tensors["unet.mid_block.attentions.0.proj_in.weight"])[1000] ^= 1

    def until(self, is_so: Callable[[WorkerState], bool]) -> WorkerState:
        """Wait for the worker to be in some state."""
        waiting = threading.Event()
        for _ in range(int(WAIT_S / 0.01)):
            state = self.worker.snapshot()
            if is_so(state):
                return state
            waiting.wait(0.01)
        raise AssertionError(self.worker.snapshot())


def broken(bench: Bench) -> ParsedAdapter:
    sound = parsed_adapter(bench.pipeline.manifest)
    strange = LowRank(torch.ones(1, 3), torch.ones(3, 1), 1.0, 1.0)
    return ParsedAdapter("broken", {"unet": {**sound.components["unet"], "no.such": strange}}, Coverage(1, 1))


@pytest.mark.parametrize("base_weights", ["device", "host"])
def test_a_flipped_bit_is_noticed_while_nothing_waits_and_the_replica_is_unhealthy(
    base_weights: Literal["device", "host"],
) -> None:
    bench = Bench(rest_s=0.01, base_weights=base_weights)
    bench.until(lambda state: state.self_checks > 0)
    assert diagnose(bench.worker.snapshot(), "demo/sd15") is None
    bench.flip_a_bit()
    state = bench.until(lambda state: state.is_corrupt and not state.is_alive)
    found = diagnose(state, "demo/sd15")
    assert found is not None
    assert "damaged in memory" in found.message
    with pytest.raises(ReplicaLost):
        bench.worker.submit(request(), ())
    bench.worker.close()


def test_a_flipped_bit_is_noticed_by_a_worker_that_is_never_idle() -> None:
    bench = Bench(rest_s=3600.0, slice_bytes=64 << 20)  # one slice is everything
    bench.until(lambda state: state.self_checks > 0)
    opened = threading.Event()
    held = bench.worker.submit(request(width=128), (), on_event=on_steps(lambda *_: opened.wait(WAIT_S)))
    waiting = bench.worker.submit(request(), ())
    bench.flip_a_bit()
    opened.set()
    held.future.result(WAIT_S)
    with pytest.raises(ReplicaLost):
        waiting.future.result(WAIT_S)
    assert bench.worker.snapshot().is_corrupt
    bench.worker.close()


def test_after_an_error_in_application_everything_is_checked_at_once() -> None:
    bench = Bench(rest_s=3600.0, slice_bytes=1 << 12)  # slice by slice it would take long to come to the damage
    opened, reached = threading.Event(), threading.Event()

    def hold(step: int, steps: int) -> None:
        reached.set()
        assert opened.wait(WAIT_S)

    bench.worker.submit(request(width=128, steps=1), (), on_event=on_steps(hold))
    assert reached.wait(WAIT_S)
    bench.flip_a_bit()
    job = bench.worker.submit(request(adapters=(use_of("me/bad"),)), [(broken(bench), 1.0)])
    opened.set()
    with pytest.raises(ReplicaLost):
        job.future.result(WAIT_S)
    assert bench.until(lambda state: not state.is_alive).is_corrupt
    bench.worker.close()


@pytest.mark.parametrize("base_weights", [pytest.param("device", marks=pytest.mark.slow), "host"])
def test_an_ordinary_run_with_swaps_failures_and_cancellations_never_trips(
    base_weights: Literal["device", "host"],
) -> None:
    bench = Bench(rest_s=0.0, slice_bytes=1 << 16, base_weights=base_weights)
    adapters = [parsed_adapter(bench.pipeline.manifest, seed=seed) for seed in range(3)]
    for turn in range(12):
        adapter = adapters[turn % 3]
        wanted = request(steps=1, adapters=(use_of("me/it"),))
        jobs = [bench.worker.submit(wanted, [(adapter, 1.0)]), bench.worker.submit(request(steps=1), ())]
        jobs.append(bench.worker.submit(wanted, [(broken(bench), 1.0)]))
        bench.worker.submit(wanted, [(adapter, 0.5)]).cancel()
        assert [len(job.future.result(WAIT_S).images) for job in jobs[:2]] == [1, 1]
        with pytest.raises(InternalError):
            jobs[2].future.result(WAIT_S)
    completed_rounds = bench.worker.snapshot().self_checks
    state = bench.until(lambda state: state.self_checks > completed_rounds)
    assert (state.is_corrupt, state.is_alive) == (False, True)
    bench.worker.close()
