"""What taking turns between steps costs where nobody gains by it: `python -m tests.bench_steps [sd15|sdxl]`.

Draws the same requests on two workers over a demo base, one whose runs take turns and one whose runs keep the device to
their end, in pairs within one process: alone, and with four callers at a time. It compares processor time, which other
work on the machine disturbs less than the clock on the wall.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from serve_app.config import BaseModelConfig
from serve_app.core import GenerationRequest
from serve_app.demo.embedded import embedded_root
from serve_app.engine.base.fetching import ResolvedSource
from serve_app.engine.base.manifest import bytes_of_layers
from serve_app.engine.drawing.pipeline import BasePipeline
from serve_app.engine.weights.fused import FusedWeights
from serve_app.engine.weights.placement import choose_placement
from serve_app.engine.worker.turns import SharingPolicy
from serve_app.engine.worker.worker import EngineWorker
from serve_app.settings import ModelSource
from tests.engine_cases import parsed_adapter, request, use_of

PAIRS = 24
ROUNDS = 6
CALLERS = 4
EACH = 4


class Bench:
    """One worker over a demo base of its own."""

    def __init__(self, base: str, sharing: SharingPolicy | None) -> None:
        folder = embedded_root() / "demo" / base
        config = BaseModelConfig(id=f"demo/{base}", source=ModelSource(folder=folder))
        self.pipeline = BasePipeline.load(config, ResolvedSource(folder=folder), device=torch.device("cpu"))
        self.adapters = [parsed_adapter(self.pipeline.manifest, seed=seed) for seed in range(CALLERS)]
        sets = choose_placement(
            "auto", "auto", layer_bytes=bytes_of_layers(self.pipeline.components), reserved_bytes=0, free_bytes=None,
            cache_bytes=config.replica.fused_cache,
        ).fused_sets  # fmt: skip
        self.worker = EngineWorker(
            self.pipeline, FusedWeights(self.pipeline.components, fused_sets=sets), max_batch_images=4,
            torch_threads=1, sharing=sharing,
        )  # fmt: skip

    def draw(self, wanted: GenerationRequest, adapter: int) -> None:
        self.worker.submit(wanted, [(self.adapters[adapter], 1.0)]).future.result()

    def alone(self, number: int) -> float:
        """Return the seconds of processor time of one request."""
        began = time.process_time()
        self.draw(request(seed=number, steps=12, adapters=(use_of("me/0"),)), 0)
        return time.process_time() - began

    def together(self) -> float:
        """Return the seconds of processor time of the requests of several callers, who ask for 1 to 4 images."""

        def call(caller: int) -> None:
            for number in range(EACH):
                wanted = request(seed=number, steps=8, num_images=1 + caller, adapters=(use_of(f"me/{caller}"),))
                self.draw(wanted, caller)

        began = time.process_time()
        with ThreadPoolExecutor(CALLERS) as callers:
            list(callers.map(call, range(CALLERS)))
        return time.process_time() - began


def in_pairs(ours: Callable[[int], float], theirs: Callable[[int], float], count: int) -> list[tuple[float, float]]:
    """Measure both `count` times, each first in every other pair: a worker finds caches as the one before left them."""
    pairs: list[tuple[float, float]] = []
    for number in range(count):
        if number % 2:
            theirs_s, ours_s = theirs(number), ours(number)
        else:
            ours_s, theirs_s = ours(number), theirs(number)
        pairs.append((ours_s, theirs_s))
    return pairs


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    base = sys.argv[1] if len(sys.argv) > 1 else "sd15"
    shared, whole = Bench(base, SharingPolicy()), Bench(base, None)
    for bench in (shared, whole):
        bench.alone(0)
    ratios = [ours / theirs for ours, theirs in in_pairs(shared.alone, whole.alone, PAIRS)]
    sys.stdout.write(f"alone: {statistics.median(ratios):.3f} of the time of whole passes, median of {PAIRS} pairs\n")
    together = in_pairs(lambda _: shared.together(), lambda _: whole.together(), ROUNDS)
    ratio = sum(theirs for _, theirs in together) / sum(ours for ours, _ in together)
    sys.stdout.write(f"{CALLERS} callers: {ratio:.3f} of the throughput of whole passes, {ROUNDS} rounds\n")
    for name, bench in (("turns", shared), ("whole passes", whole)):
        state = bench.worker.snapshot()
        each_ms = 1e3 * state.changing_s / max(state.changes, 1)
        sys.stdout.write(f"{name}: {state.changes} changes of adapters, {each_ms:.1f} ms each\n")
        bench.worker.close()


if __name__ == "__main__":
    main()
