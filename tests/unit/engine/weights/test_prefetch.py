"""Preparing ahead gives way when memory runs out, and comes back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from serve_app.engine.adapters.deltas import Coverage, LowRank, ParsedAdapter
from serve_app.engine.weights.fused import AdapterSet, FusedWeights, PreparedSwap
from serve_app.engine.weights.prefetch import RETRY_AFTER_S, SwapPrefetcher


def adapter(name: str) -> ParsedAdapter:
    delta = LowRank(torch.randn(2, 8), torch.randn(8, 2), 2.0, 2.0)
    return ParsedAdapter(name, {"unet": {"0": delta}}, Coverage(1, 1))


class ShortOnce(FusedWeights):
    """Weights that find no room the first time that something is prepared."""

    is_short = True

    def prepare(self, composition: AdapterSet) -> PreparedSwap:
        """Fail once."""
        if self.is_short:
            self.is_short = False
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().prepare(composition)


class Bench:
    """A prefetcher on a clock of its own, whose first preparation runs out of memory."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.prefetcher = SwapPrefetcher(
            ShortOnce({"unet": nn.Sequential(nn.Linear(8, 8))}), clock=lambda: self.now_s, torch_threads=1
        )

    def swap(self, name: str) -> None:
        composition = [(adapter(name), 1.0)]
        self.prefetcher.prepare(composition)
        self.prefetcher.apply(composition)


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.prefetcher.close()


def test_one_shortage_ends_preparing_for_a_while_and_not_for_ever(bench: Bench) -> None:
    for name in ("first", "second"):
        bench.swap(name)
        bench.prefetcher.resume()  # passes have room all the while
    assert bench.prefetcher.bound == 0
    bench.now_s += RETRY_AFTER_S
    bench.swap("third")
    assert bench.prefetcher.bound == 1


def test_a_pause_lasts_until_memory_suffices_again(bench: Bench) -> None:
    bench.swap("first")
    bench.prefetcher.pause()
    bench.now_s += 100 * RETRY_AFTER_S
    bench.swap("second")
    assert bench.prefetcher.bound == 0
    bench.prefetcher.resume()
    bench.swap("third")
    assert bench.prefetcher.bound == 1
