"""Stacked layers, and blocks of large ones, are fused with the bits of each layer as a whole."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from serve_app.engine.adapters.deltas import Coverage, LowRank, ParsedAdapter, StackedLayers
from serve_app.engine.adapters.stacks import empty_rows, memory_of, rows_of, stack_layers
from serve_app.engine.weights.fuse import BatchedProducts, StackFuser, fuse_weight, weight_delta
from serve_app.engine.weights.fused import FusedWeights

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


class Calls(TorchDispatchMode):
    """Counts the operations that reach a device, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one, and do it."""
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_a_swap_by_the_way_of_a_gpu_is_a_copy_and_three_calls_for_each_shape() -> None:
    shapes = {(64, 64): 20, (256, 64): 5, (64, 256): 5}
    with torch.device("meta"):
        layers = [nn.Linear(shape[1], shape[0], bias=False) for shape, count in shapes.items() for _ in range(count)]
    weights = FusedWeights({"unet": nn.Sequential(*layers)})

    def adapter(digest: str) -> ParsedAdapter:
        changes = {f"{place}": change((layer.out_features, layer.in_features), 4, torch.float32, place)
                   for place, layer in enumerate(layers)}  # fmt: skip
        return ParsedAdapter(digest, in_one_buffer(stack_layers({"unet": changes})), Coverage(1, 1))

    weights.apply([(adapter("first"), 0.5)])  # makes the buffers
    second = adapter("second")
    with Calls() as calls:
        weights.apply([(second, 0.5)])
    assert [calls.counts[name] for name in ("copy_", "bmm", "mul_", "add_", "mm", "_to_copy")] == [3, 3, 3, 3, 0, 0]


def in_one_buffer(layers: StackedLayers) -> StackedLayers:
    """Return the same changes with their factors one after another in one piece of memory, as files are read."""
    buffer = torch.cat([memory_of(tensor) for tensor in layers.tensors()])
    used = 0

    def moved(rows: Tensor) -> Tensor:
        nonlocal used
        size = memory_of(rows).numel()
        used += size
        return rows_of(buffer[used - size : used], len(rows), rows.shape[1:])

    return layers.mapped(moved, lambda delta: delta)
