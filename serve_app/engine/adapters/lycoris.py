"""LyCORIS's methods: LoHa and LoKr, with or without a Tucker core, and full differences.

Factors that a file splits further (a core, a decomposed Kronecker half) are multiplied out in float32.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from serve_app.engine.adapters.deltas import Dense, Hadamard, Kronecker, dtype_named
from serve_app.engine.adapters.target_layers import TargetLayer, alpha_and_divisor, check_rank, inputs_of


def hadamard(parts: Mapping[str, Tensor], target: TargetLayer) -> Hadamard:
    """Return the change of a LoHa layer."""
    pairs = [_hadamard_pair(parts, number, target) for number in ("1", "2")]
    (up_1, down_1), (up_2, down_2) = pairs
    rank = parts["hada_w1_b"].shape[0]
    alpha, divisor = alpha_and_divisor(parts, rank, None, target)
    return Hadamard(up_1, down_1, up_2, down_2, alpha, divisor)


def _hadamard_pair(parts: Mapping[str, Tensor], number: str, target: TargetLayer) -> tuple[Tensor, Tensor]:
    up, down, core = (parts.get(f"hada_{part}") for part in (f"w{number}_a", f"w{number}_b", f"t{number}"))
    if up is None or down is None or up.ndim != 2 or down.ndim != 2:
        raise target.malformed("lacks one of its four factors, or has one that is no matrix")
    if core is not None:
        up, down = _with_core(core, up, down, target)
    shape, dtype = target.layer.shape, dtype_named(target.layer.dtype)
    check_rank(up.shape[1], target)
    if up.shape[0] != shape[0] or down.shape[0] != up.shape[1] or down.shape[1] != inputs_of(shape):
        raise target.mismatch(f"the file has factors of shape {list(up.shape)} and {list(down.shape)}")
    return up.to(dtype), down.to(dtype)


def _with_core(core: Tensor, up: Tensor, down: Tensor, target: TargetLayer) -> tuple[Tensor, Tensor]:
    """Fold a Tucker core [p, q, kh, kw] between up [p, out] and down [q, in] into a plain pair."""
    if core.ndim != 4 or core.shape[0] != up.shape[0] or core.shape[1] != down.shape[0]:
        raise target.mismatch(f"the file has a core of shape {list(core.shape)}")
    folded = torch.einsum("pqhw,qi->pihw", core.float(), down.float())
    return up.T, folded.flatten(1)


def kronecker(parts: Mapping[str, Tensor], target: TargetLayer) -> Kronecker:
    """Return the change of a LoKr layer."""
    left, left_rank = _kronecker_half(parts, "lokr_w1", None, target)
    right, right_rank = _kronecker_half(parts, "lokr_w2", parts.get("lokr_t2"), target)
    shape, dtype = target.layer.shape, dtype_named(target.layer.dtype)
    if left.ndim == 2 and right.ndim == 2 and len(shape) == 4 and left.shape[1] * right.shape[1] == inputs_of(shape):
        right = right.reshape(right.shape[0], -1, *shape[2:])
    fits = left.ndim == 2 and right.ndim == len(shape) and right.shape[2:] == shape[2:]
    if not fits or (left.shape[0] * right.shape[0], left.shape[1] * right.shape[1]) != shape[:2]:
        raise target.mismatch(f"the file has Kronecker factors of shape {list(left.shape)} and {list(right.shape)}")
    rank = right_rank or left_rank
    alpha, divisor = alpha_and_divisor(parts, rank or 1, None, target)
    if not rank:
        alpha, divisor = 1.0, 1.0  # whole factors carry their scale
    return Kronecker(left.to(dtype), right.to(dtype), alpha, divisor)


def dense(parts: Mapping[str, Tensor], target: TargetLayer) -> Dense:
    """Return the change of a layer whose whole difference is in the file; no alpha scales it."""
    shape, dtype = target.layer.shape, dtype_named(target.layer.dtype)
    weight, bias = parts.get("diff"), parts.get("diff_b")
    alpha_and_divisor(parts, 1, None, target)  # read, since some tools write it, and of no effect
    if weight is None:
        weight = torch.zeros(shape)  # the bias alone changes
    if weight.shape[:2] == shape[:2] and weight.numel() == torch.Size(shape).numel():
        weight = weight.reshape(shape)  # a 1x1 convolution may be spelt as a linear layer, or back
    if weight.shape != shape:
        raise target.mismatch(f"the file has a difference of shape {list(weight.shape)}")
    if bias is None:
        return Dense(weight.to(dtype))
    if not target.layer.has_bias or bias.shape != shape[:1]:
        raise target.mismatch(f"the file changes a bias of shape {list(bias.shape)}")
    return Dense(weight.to(dtype), bias.to(dtype))


def _kronecker_half(
    parts: Mapping[str, Tensor], half: str, core: Tensor | None, target: TargetLayer
) -> tuple[Tensor, int]:
    """Return one factor multiplied out, and the rank it was stored with; 0 for one stored whole."""
    whole, up, down = (parts.get(key) for key in (half, f"{half}_a", f"{half}_b"))
    if whole is not None and up is None and down is None and core is None:
        return (whole.flatten(1) if whole.ndim == 4 and len(target.layer.shape) == 2 else whole), 0
    if whole is not None or up is None or down is None or up.ndim != 2 or down.ndim != 2:
        raise target.malformed("lacks a Kronecker factor, or has one twice")
    check_rank(down.shape[0], target)
    if core is not None:
        if core.ndim != 4 or core.shape[0] != up.shape[0] or core.shape[1] != down.shape[0]:
            raise target.mismatch(f"the file has a core of shape {list(core.shape)}")
        return torch.einsum("pqhw,po,qi->oihw", core.float(), up.float(), down.float()), down.shape[0]
    if up.shape[1] != down.shape[0]:
        raise target.mismatch(f"the file has factors of shape {list(up.shape)} and {list(down.shape)}")
    return up.float() @ down.float(), down.shape[0]
