"""Large layers are fused block by block, with the bits of the whole."""

from __future__ import annotations

import pytest
import torch

from serve_app.engine.adapters.deltas import LowRank
from serve_app.engine.weights.fuse import LayerUpdate, fuse_weight, fuse_weights

SHAPES = [(640, 640), (1283, 1290), (700, 2048), (9, 60_000)]


def change(shape: tuple[int, int], rank: int, dtype: torch.dtype, seed: int) -> LowRank:
    random = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, shape[1], generator=random) * 0.02
    up = torch.randn(shape[0], rank, generator=random) * 0.02
    return LowRank(down.to(dtype), up.to(dtype), alpha=3.0, divisor=float(rank))


@pytest.mark.parametrize("rank", [3, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_blocks_of_a_layer_have_the_bits_of_the_whole(dtype: torch.dtype, rank: int) -> None:
    bases = [torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype) for shape in SHAPES]
    outs, wholes = [base.clone() for base in bases], [base.clone() for base in bases]
    currents = bases
    for seed, scale in ((2, 0.7), (3, -1.3)):  # the second adapter adds to what the first left
        changes = [change(shape, rank, dtype, seed) for shape in SHAPES]
        rows = zip(outs, bases, currents, changes, strict=True)
        fuse_weights([LayerUpdate(out, base, current, delta, scale) for out, base, current, delta in rows])
        for whole, base, delta in zip(wholes, bases, changes, strict=True):
            fuse_weight(whole, base, whole, delta, scale)
        assert all(torch.equal(out, whole) for out, whole in zip(outs, wholes, strict=True))
        currents = outs
