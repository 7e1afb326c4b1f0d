"""Stacked layers, and blocks of large ones, are fused with the bits of each layer as a whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from serve_app.engine.adapters.deltas import LowRank
from serve_app.engine.adapters.stacks import empty_rows, stack_layers
from serve_app.engine.weights.fuse import BatchedProducts, StackFuser, fuse_weight, weight_delta

SHAPES = [(640, 640), (1283, 1290), (700, 2048), (9, 60_000)]


def change(shape: tuple[int, int], rank: int, dtype: torch.dtype, seed: int) -> LowRank:
    random = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, shape[1], generator=random) * 0.02
    up = torch.randn(shape[0], rank, generator=random) * 0.02
    return LowRank(down.to(dtype), up.to(dtype), alpha=3.0, divisor=float(rank))


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("rank", [3, 32])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_of_a_layer_have_the_bits_of_the_whole(dtype: torch.dtype, rank: int) -> None:
    for shape in SHAPES:
        base = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        out, whole, current = base.clone(), base.clone(), base
        for seed, scale in ((2, 0.7), (3, -1.3)):  # the second adapter adds to what the first left
            delta = change(shape, rank, dtype, seed)
            fuse_weight(out, base, current, delta, scale)
            whole = whole + weight_delta(delta, base, scale)
            assert torch.equal(out, whole)
            current = out


@pytest.mark.parametrize("rank", [1, 3, 32])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(48, 64), (33, 7), (320, 320)], ids=str)
def test_a_stack_has_the_bits_of_its_layers(shape: tuple[int, int], dtype: torch.dtype, rank: int) -> None:
    count, fuser = 60, StackFuser()  # more than the products of one part
    bases = empty_rows(count, shape, dtype, torch.device("cpu"))
    bases.copy_(torch.randn(count, *shape))
    outs, wholes = empty_rows(count, shape, dtype, torch.device("cpu")), list(bases.clone().unbind())
    for adapter, scale in ((0, 0.7), (1, -1.3), (2, 1.0)):
        changes = {str(place): change(shape, rank, dtype, count * adapter + place) for place in range(count)}
        (stack,) = stack_layers({"unet": changes}).stacks
        fuser.fuse(outs, None if adapter else bases, stack.ups, stack.downs, stack.factor(scale))
        for place, base in enumerate(bases):
            wholes[place] = wholes[place] + weight_delta(changes[stack.modules[place]], base, scale)
        assert all(torch.equal(out, whole) for out, whole in zip(outs, wholes, strict=True))


def test_a_batched_product_with_other_bits_is_never_used(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def off_by_a_bit(ups: Tensor, downs: Tensor, *, out: Tensor) -> Tensor:
        calls.append(len(ups))
        torch.matmul(ups, downs, out=out)
        out[-1, -1, -1] = torch.nextafter(out[-1, -1, -1], torch.tensor(9.0))
        return out

    monkeypatch.setattr(torch, "bmm", off_by_a_bit)
    products, ups, downs, outs = BatchedProducts(), torch.randn(4, 8, 2), torch.randn(4, 2, 8), torch.empty(4, 8, 8)
    for _ in range(3):
        products.multiply(ups, downs, outs)
        assert torch.equal(outs, torch.stack([up @ down for up, down in zip(ups, downs, strict=True)]))
    assert calls == [4]  # tried once
