"""The arithmetic of adapters: pristine weight, change and scale -> fused weight.

Owns the formulas. Every function reads its inputs alone and writes only `out`, so that a result cannot depend on
what ran before. Operations, their order and their dtypes are those of peft's `get_delta_weight` and `merge`, so that
results equal a fresh load and fuse by diffusers to the last bit. Layers that are alike take each operation together,
so that a swap's cost in Python does not grow with their number.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from serve_app.engine.adapters.deltas import Delta, Dense, Direction, Dora, Hadamard, LowRank
from serve_app.engine.adapters.stacks import empty_rows
from serve_app.engine.weights.parameters import LARGE_ELEMENTS

# The most memory for products while a stack is fused: on a CPU they should stay in its cache.
_SCRATCH_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}
# On a CPU a layer with a larger product is fused in blocks of rows, each from product to sum while it is in the
# cache next to the core. Rows of a product do not depend on each other, so that the bits are those of the whole.
_BLOCK_ELEMENTS = 1 << 19
_ROWS_TOGETHER = 16  # blocks begin where a matrix of their own might, for any rank


class BatchedProducts:
    """Products of stacked factors: in one call where this device gives the bits of one by one.

    A batched product may sum in another order than peft's, which multiplies layer by layer. That depends on shapes,
    dtype and library alone, so that each kind is tried both ways when it first comes.
    """

    def __init__(self) -> None:
        self._is_exact: dict[object, bool] = {}

    def multiply(self, ups: Tensor, downs: Tensor, outs: Tensor) -> None:
        """Write ups @ downs, layer by layer, to `outs`: [n, out, rank], [n, rank, in], [n, out, in]."""
        kind = (ups.shape, downs.shape[2], ups.stride(), downs.stride(), outs.stride(), ups.dtype, ups.device)
        is_exact = self._is_exact.get(kind)
        if is_exact is None:
            is_exact = self._is_exact[kind] = len(ups) > 1 and self._try(ups, downs, outs)
        if is_exact:
            torch.bmm(ups, downs, out=outs)
        else:
            for up, down, out in zip(ups.unbind(), downs.unbind(), outs.unbind(), strict=True):
                torch.mm(up, down, out=out)

    @staticmethod
    def _try(ups: Tensor, downs: Tensor, outs: Tensor) -> bool:
        torch.bmm(ups, downs, out=outs)
        if outs.is_meta:  # a benchmark's layers without values: no bits could differ
            return True
        differs = torch.zeros((), dtype=torch.bool, device=outs.device)
        for up, down, out in zip(ups.unbind(), downs.unbind(), outs.unbind(), strict=True):
            differs |= (torch.mm(up, down) != out).any()
        return not differs.item()


class StackFuser:
    """Fuses stacked changes into stacked weights; `products` remembers what this device multiplies exactly."""

    def __init__(self) -> None:
        self.products = BatchedProducts()

    def fuse(self, outs: Tensor, pristine: Tensor | None, ups: Tensor, downs: Tensor, factor: float) -> None:
        """Write `pristine` with the changes to `outs`, or where that is None add them to what `outs` holds.

        All are [n, ...]; the factors are in the weights' dtype.
        """
        width = torch.float32.itemsize
        count = max(_SCRATCH_BYTES.get(outs.device.type, 0) // max(width * outs[0].numel(), 1), 1)
        is_wide = outs.device.type != "cpu" and pristine is not None  # no scratch is needed
        for start in range(0, len(outs), len(outs) if is_wide else count):
            part = slice(start, len(outs) if is_wide else start + count)
            base = None if pristine is None else pristine[part]
            self._fuse_part(outs[part], base, ups[part], downs[part], factor)

    def _fuse_part(self, outs: Tensor, pristine: Tensor | None, ups: Tensor, downs: Tensor, factor: float) -> None:
        ups, downs = _computable_rows(ups, outs.device), _computable_rows(downs, outs.device)
        is_direct = pristine is not None and ups.dtype == outs.dtype
        products = outs if is_direct else empty_rows(len(outs), outs.shape[1:], ups.dtype, outs.device)
        self.products.multiply(ups, downs, products)
        if factor != 1.0:
            products.mul_(factor)
        if pristine is None:
            outs.add_(products.to(outs.dtype))
            return
        if not is_direct:
            outs.copy_(products)
        outs.add_(pristine)


def fuse_weight(out: Tensor, pristine: Tensor, current: Tensor, delta: Delta, scale: float) -> None:
    """Write `current` changed by `delta` to `out`; `current` is `pristine` or `out` itself, after earlier adapters."""
    if isinstance(delta, Dora):
        _fuse_dora(out, pristine, current, delta, scale)
    elif isinstance(delta, LowRank) and _is_large(out) and delta.down.dtype == out.dtype:
        _fuse_in_blocks(out, current, delta, scale)
    else:
        torch.add(current, weight_delta(delta, pristine, scale), out=out)


def _is_large(out: Tensor) -> bool:
    return out.device.type == "cpu" and out.ndim == 2 and out.numel() > LARGE_ELEMENTS


def _fuse_in_blocks(out: Tensor, current: Tensor, delta: LowRank, scale: float) -> None:
    """Fuse one large linear layer on a CPU."""
    up, down, factor = _computable(delta.up, out.device), _computable(delta.down, out.device), delta.factor(scale)
    blocks = -(-out.numel() // _BLOCK_ELEMENTS)
    rows = -(-len(out) // (blocks * _ROWS_TOGETHER)) * _ROWS_TOGETHER
    memory = torch.empty(min(rows, len(out)) * out.shape[1], dtype=up.dtype)
    for part, base, up_rows in zip(out.split(rows), current.split(rows), up.split(rows), strict=True):
        changes = torch.mm(up_rows, down, out=memory[: part.numel()].view(part.shape))
        if factor != 1.0:
            changes.mul_(factor)
        if current is out:
            part.add_(changes.to(part.dtype))
        else:
            part.copy_(changes)
            part.add_(base)


def _fuse_dora(out: Tensor, pristine: Tensor, current: Tensor, delta: Dora, scale: float) -> None:
    change = weight_delta(delta.direction, pristine, 1.0 if delta.is_scaled_whole else scale)
    magnitude = delta.magnitude.to(pristine.device, non_blocking=True)
    if delta.is_per_input:
        norm = (pristine + change).transpose(0, 1).flatten(1).norm(dim=1)
        ratio = (magnitude / norm).view(1, -1, *[1] * (pristine.ndim - 2))
    else:
        ratio = (magnitude / _norm_per_output(pristine + change)).view(-1, *[1] * (pristine.ndim - 1))
    if not delta.is_scaled_whole or (scale == 1.0 and current is pristine):
        out.copy_(ratio * (current + change))
    else:
        torch.add(current, (ratio * (pristine + change) - pristine) * scale, out=out)


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


def _computable_rows(factors: Tensor, device: torch.device) -> Tensor:
    """Do what `_computable` does to stacked factors."""
    if device.type == "cpu" and factors.dtype in (torch.float16, torch.bfloat16):
        return empty_rows(len(factors), factors.shape[1:], torch.float32, device).copy_(factors)
    return factors.to(device, non_blocking=True)


def _norm_per_output(weight: Tensor) -> Tensor:
    """Return the norm of each output's weights, [out]; linear layers and convolutions differ in peft, hence here."""
    if weight.ndim == 2:
        return torch.linalg.norm(weight, dim=1).to(weight.dtype)
    return weight.norm(p=2, dim=tuple(range(1, weight.ndim)))
