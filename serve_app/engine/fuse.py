"""The arithmetic of adapters: pristine weight, change and scale -> fused weight.

Owns the formulas. Every function reads its inputs alone and writes only `out`, so that a result cannot depend on
what ran before. Operations, their order and their dtypes are those of peft's `get_delta_weight` and `merge`, so that
results equal a fresh load and fuse by diffusers to the last bit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from serve_app.engine.adapter import Delta, Dora, Hadamard, Kronecker, LowRank


def fuse_weight(out: Tensor, pristine: Tensor, current: Tensor, delta: Delta, scale: float) -> None:
    """Write `current` changed by `delta` to `out`; `current` is `pristine` or `out` itself, after earlier adapters."""
    if not isinstance(delta, Dora):
        torch.add(current, weight_delta(delta, pristine, scale), out=out)
        return
    change = weight_delta(delta.direction, pristine, scale)
    norm = _norm_per_output(pristine + change)
    ratio = (delta.magnitude.to(pristine.device, non_blocking=True) / norm).view(-1, *[1] * (pristine.ndim - 1))
    out.copy_(ratio * (current + change))


def fuse_bias(out: Tensor, current: Tensor, delta: Delta, scale: float) -> None:
    """Write `current`, a bias, changed by `delta` to `out`; the change must have a bias."""
    low_rank = delta.direction if isinstance(delta, Dora) else delta
    assert isinstance(low_rank, LowRank)
    assert low_rank.bias is not None
    bias = low_rank.bias.to(current.device, non_blocking=True)
    torch.add(current, bias * low_rank.factor(scale), out=out)


def bias_of(delta: Delta) -> Tensor | None:
    """Return what a change adds to the layer's bias, unscaled."""
    low_rank = delta.direction if isinstance(delta, Dora) else delta
    return low_rank.bias if isinstance(low_rank, LowRank) else None


def weight_delta(delta: LowRank | Hadamard | Kronecker, weight: Tensor, scale: float) -> Tensor:
    """Return what to add to `weight`, in its shape and on its device, in the dtype of the factors."""
    if isinstance(delta, LowRank):
        return _low_rank_delta(delta, weight, scale)
    if isinstance(delta, Hadamard):
        factors = (delta.up_1, delta.down_1, delta.up_2, delta.down_2)
        up_1, down_1, up_2, down_2 = (_computable(factor, weight.device) for factor in factors)
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
