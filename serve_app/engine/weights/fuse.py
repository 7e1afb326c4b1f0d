"""The arithmetic of adapters: pristine weight, change and scale -> fused weight.

Owns the formulas. Every function reads its inputs alone and writes only `out`, so that a result cannot depend on
what ran before. Operations, their order and their dtypes are those of peft's `get_delta_weight` and `merge`, so that
results equal a fresh load and fuse by diffusers to the last bit. Layers of one shape share every operation but the
product of their factors, so that a swap's cost in Python does not grow with its arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from serve_app.engine.adapters.deltas import Delta, Dense, Direction, Dora, Hadamard, LowRank

# The bits of a product may depend on how its operands are aligned; this is how torch places tensors of their own.
_ALIGNMENT_BYTES = 64
# What products may take while a group is fused: on a CPU they should stay in its cache.
_SCRATCH_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}
# On a CPU a layer with a larger product is fused in blocks of rows, each from product to sum while it is in the
# cache next to the core. Rows of a product do not depend on each other, so that the bits are those of the whole.
_LARGE_ELEMENTS = 1 << 18
_BLOCK_ELEMENTS = 1 << 19
_ROWS_TOGETHER = 16  # blocks begin where a matrix of their own might, whatever the rank

# The same operation on each pair of tensors, called once: what optimisers of torch are made of.
_add_all = torch._foreach_add_  # pyright: ignore[reportPrivateImportUsage]
_copy_all = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]
_scale_all = torch._foreach_mul_  # pyright: ignore[reportPrivateImportUsage]


class LayerUpdate(NamedTuple):
    """One layer to fuse: write `current` changed by `delta` to `out`.

    `current` is `pristine`, or `out` itself after earlier adapters.
    """

    out: Tensor
    pristine: Tensor
    current: Tensor
    delta: Delta
    scale: float


# One linear layer of a group: where to write, the pristine weight, up and down.
_Product = tuple[Tensor, Tensor, Tensor, Tensor]


def fuse_weights(changes: Sequence[LayerUpdate]) -> None:
    """Fuse layers that do not depend on each other: those of one adapter."""
    groups: dict[object, list[_Product]] = {}
    factors: dict[object, tuple[float, bool]] = {}
    for out, pristine, current, delta, scale in changes:
        if type(delta) is LowRank and pristine.ndim == 2 and delta.down.dtype == pristine.dtype:
            up, down, is_first = delta.up, delta.down, current is not out
            alike = (up.shape, down.shape, pristine.dtype, is_first, delta.alpha, delta.divisor, scale)
            group = groups.get(alike)
            if group is None:
                group = groups[alike] = []
                factors[alike] = delta.factor(scale), is_first
            group.append((out, pristine, up, down))
        else:
            fuse_weight(out, pristine, current, delta, scale)
    scratch: dict[torch.dtype, Tensor] = {}
    for alike, group in groups.items():
        first = group[0][0]
        if first.device.type == "cpu" and first.numel() > _LARGE_ELEMENTS:
            for product in group:
                _fuse_in_blocks(product, *factors[alike], scratch)
            continue
        count = max(_SCRATCH_BYTES.get(first.device.type, 0) // max(4 * first.numel(), 1), 1)
        for start in range(0, len(group), count):
            _fuse_alike(group[start : start + count], *factors[alike])


def _fuse_alike(group: Sequence[_Product], factor: float, is_first: bool) -> None:
    """Fuse linear layers of one shape, rank and dtype; `is_first` is false after earlier adapters."""
    outs, pristines, ups, downs = (list(column) for column in zip(*group, strict=True))
    dtype, device = outs[0].dtype, outs[0].device
    ups, downs = _computable_all(ups, device), _computable_all(downs, device)
    if is_first and ups[0].dtype == dtype:
        _multiply(ups, downs, outs)
        if factor != 1.0:
            _scale_all(outs, factor)
        _add_all(outs, pristines)
        return
    scratch = _aligned(len(outs), outs[0].shape, ups[0].dtype, device)
    products = scratch.unbind()
    _multiply(ups, downs, products)
    if factor != 1.0:
        scratch.mul_(factor)
    if is_first:
        _copy_all(outs, products)
        _add_all(outs, pristines)
    else:
        _add_all(outs, scratch.to(dtype).unbind())


def _fuse_in_blocks(product: _Product, factor: float, is_first: bool, scratch: dict[torch.dtype, Tensor]) -> None:
    """Fuse one large linear layer on a CPU; `scratch` keeps memory that was touched for the next layer."""
    out, pristine, up, down = product
    up, down = _computable(up, out.device), _computable(down, out.device)
    blocks = -(-out.numel() // _BLOCK_ELEMENTS)
    rows = -(-len(out) // (blocks * _ROWS_TOGETHER)) * _ROWS_TOGETHER
    needed = min(rows, len(out)) * out.shape[1]
    memory = scratch.get(up.dtype)
    if memory is None or memory.numel() < needed:
        memory = scratch[up.dtype] = torch.empty(needed, dtype=up.dtype)
    for part, base, up_rows in zip(out.split(rows), pristine.split(rows), up.split(rows), strict=True):
        changes = torch.mm(up_rows, down, out=memory[: part.numel()].view(part.shape))
        if factor != 1.0:
            changes.mul_(factor)
        if is_first:
            part.copy_(changes)
            part.add_(base)
        else:
            part.add_(changes.to(part.dtype))


def _multiply(ups: Sequence[Tensor], downs: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
    # One by one: a batched product may sum in another order than peft's.
    for up, down, out in zip(ups, downs, outs, strict=True):
        torch.mm(up, down, out=out)


def _computable_all(factors: list[Tensor], device: torch.device) -> list[Tensor]:
    """Do what `_computable` does to factors of one shape and dtype."""
    first = factors[0]
    if device.type == "cpu" and first.dtype in (torch.float16, torch.bfloat16):
        converted = _aligned(len(factors), first.shape, torch.float32, device).unbind()
        _copy_all(converted, factors)
        return list(converted)
    return [factor.to(device, non_blocking=True) for factor in factors]


def _aligned(count: int, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return room for `count` matrices, [count, *shape], each where a tensor of its own might lie."""
    rows, columns = shape
    per_line = _ALIGNMENT_BYTES // dtype.itemsize
    stride = -(-rows * columns // per_line) * per_line
    return torch.empty(count * stride, dtype=dtype, device=device).as_strided(
        (count, rows, columns), (stride, columns, 1)
    )


def fuse_weight(out: Tensor, pristine: Tensor, current: Tensor, delta: Delta, scale: float) -> None:
    """Write `current` changed by `delta` to `out`; `current` is `pristine` or `out` itself, after earlier adapters."""
    if not isinstance(delta, Dora):
        torch.add(current, weight_delta(delta, pristine, scale), out=out)
        return
    change = weight_delta(delta.direction, pristine, scale)
    magnitude = delta.magnitude.to(pristine.device, non_blocking=True)
    if delta.is_per_input:
        norm = (pristine + change).transpose(0, 1).flatten(1).norm(dim=1)
        ratio = (magnitude / norm).view(1, -1, *[1] * (pristine.ndim - 2))
    else:
        ratio = (magnitude / _norm_per_output(pristine + change)).view(-1, *[1] * (pristine.ndim - 1))
    out.copy_(ratio * (current + change))


def fuse_bias(out: Tensor, current: Tensor, delta: Delta, scale: float) -> None:
    """Write `current`, a bias, changed by `delta` to `out`; the change must have a bias."""
    change = delta.direction if isinstance(delta, Dora) else delta
    assert isinstance(change, LowRank | Dense)
    shift = change.shift if isinstance(change, LowRank) else None
    for addend, factor in ((change.bias, change.factor(scale)), (shift, scale)):
        if addend is not None:
            torch.add(current, addend.to(current.device, non_blocking=True) * factor, out=out)
            current = out


def changes_bias(delta: Delta) -> bool:
    """Say whether a change adds to the layer's bias."""
    change = delta.direction if isinstance(delta, Dora) else delta
    if isinstance(change, LowRank):
        return change.bias is not None or change.shift is not None
    return isinstance(change, Dense) and change.bias is not None


def weight_delta(delta: Direction, weight: Tensor, scale: float) -> Tensor:
    """Return what to add to `weight`, in its shape and on its device, in the dtype of the factors."""
    if isinstance(delta, LowRank):
        return _low_rank_delta(delta, weight, scale)
    if isinstance(delta, Dense):
        return (_computable(delta.weight, weight.device) * scale).to(weight.dtype)
    if isinstance(delta, Hadamard):
        factors = (delta.up_1, delta.down_1, delta.up_2, delta.down_2)
        # In 32 bits on every device: a half may leave the range of 16 bits where the product does not.
        up_1, down_1, up_2, down_2 = (factor.to(weight.device, torch.float32) for factor in factors)
        product = (up_1 @ down_1) * (up_2 @ down_2)
    else:
        left, right = (_computable(factor, weight.device) for factor in (delta.left, delta.right))
        product = torch.kron(left[(...,) + (None,) * (right.ndim - 2)], right.contiguous())
    return (product.reshape(weight.shape) * (scale * delta.alpha / delta.divisor)).to(weight.dtype)


def _low_rank_delta(delta: LowRank, weight: Tensor, scale: float) -> Tensor:
    down, up = _computable(delta.down, weight.device), _computable(delta.up, weight.device)
    factor = delta.factor(scale)
    if weight.ndim == 2:
        product = (up @ down) * factor
    elif weight.shape[2:4] == (1, 1):
        product = (up.squeeze(3).squeeze(2) @ down.squeeze(3).squeeze(2)).unsqueeze(2).unsqueeze(3) * factor
    else:
        product = F.conv2d(down.transpose(0, 1), up).transpose(0, 1) * factor
    return product.to(delta.down.dtype)


def _computable(factor: Tensor, device: torch.device) -> Tensor:
    """Move a factor to where it is multiplied; on the CPU 16-bit factors are multiplied in 32 bits, as peft does."""
    if device.type == "cpu" and factor.dtype in (torch.float16, torch.bfloat16):
        return factor.float()
    return factor.to(device, non_blocking=True)


def _norm_per_output(weight: Tensor) -> Tensor:
    """Return the norm of each output's weights, [out]; linear layers and convolutions differ in peft, hence here."""
    if weight.ndim == 2:
        return torch.linalg.norm(weight, dim=1).to(weight.dtype)
    return weight.norm(p=2, dim=tuple(range(1, weight.ndim)))
