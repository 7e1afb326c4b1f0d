"""The parts of one layer in a file -> its change, checked against the layer of the base.

Owns which method the parts belong to, and what LoRA's and DoRA's mean. Results are in the layer's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from serve_app.engine.adapters.deltas import Delta, Dense, Dora, Hadamard, Kronecker, LowRank, dtype_named
from serve_app.engine.adapters.lycoris import dense, hadamard, kronecker
from serve_app.engine.adapters.metadata import Scaling
from serve_app.engine.adapters.target_layers import TargetLayer, alpha_and_divisor, check_finite, check_rank
from serve_app.refusals import UnsupportedMethod

LORA_PARTS = frozenset(("down", "up", "mid", "bias", "magnitude", "dora_scale", "alpha"))


def build_delta(parts: Mapping[str, Tensor], scaling: Scaling | None, place: TargetLayer) -> Delta:
    """Return one layer's change.

    Raises:
        ShapeMismatch: the factors do not fit the layer.
        RankTooHigh: the inner width is over the limit.
        MalformedFile: parts are missing, or contradict the file's metadata.
        NonFinite: a value is, or would become, NaN or infinite.
        UnsupportedMethod: the parts belong to no method that is served.
    """
    methods = {part.partition("_")[0] for part in parts if part not in LORA_PARTS} or {"lora"}
    if methods == {"lora"}:
        delta = _lora(parts, scaling, place)
    elif scaling is not None or len(methods) > 1 or set(parts) & (LORA_PARTS - {"alpha"}):
        raise UnsupportedMethod(place.adapter, f"{place.label} mixes several methods")
    else:
        delta = {"hada": hadamard, "lokr": kronecker, "diff": dense}[methods.pop()](parts, place)
    check_finite(delta, place)
    return delta


def inner_width(delta: Delta) -> int:
    """Return the rank of a change: for Kronecker products the right factor's smaller side, if full the layer's."""
    match delta:
        case LowRank():
            return delta.rank
        case Dora():
            return delta.direction.rank
        case Hadamard():
            return delta.up_1.shape[1]
        case Kronecker():
            return min(delta.right.shape[:2])
        case Dense():
            return min(delta.weight.shape[:2])


def _lora(parts: Mapping[str, Tensor], scaling: Scaling | None, place: TargetLayer) -> LowRank | Dora:
    if "down" not in parts or "up" not in parts:
        raise place.malformed("lacks one of its two factors")
    down, up = _fitted(parts, place)
    rank = down.shape[0]
    alpha, divisor = alpha_and_divisor(parts, rank, scaling, place)
    bias = _vector(parts.get("bias"), "bias", place)
    if bias is not None and not place.layer.has_bias:
        raise place.mismatch("the file changes a bias that it does not have")
    low_rank = LowRank(down, up, alpha, divisor, bias)
    magnitude = _magnitude(parts, place)
    _check_declared(scaling, place, rank=rank, is_dora=magnitude is not None, has_bias=bias is not None)
    return low_rank if magnitude is None else Dora(low_rank, magnitude)


def _fitted(parts: Mapping[str, Tensor], place: TargetLayer) -> tuple[Tensor, Tensor]:
    """Return the factors in the layer's dtype and number of dimensions."""
    shape, dtype = place.layer.shape, dtype_named(place.layer.dtype)
    down, up = parts["down"], parts["up"]
    if "mid" in parts:
        down = _with_middle(parts["mid"], down, place)
    down, up = _with_dimensions(down, len(shape)), _with_dimensions(up, len(shape))
    if down.ndim != len(shape) or up.ndim != len(shape):
        raise place.mismatch(f"the file has factors of shape {list(down.shape)} and {list(up.shape)}")
    rank = down.shape[0]
    check_rank(rank, place)
    fits = down.shape[1:] == shape[1:] and up.shape == (shape[0], rank, *[1] * (len(shape) - 2))
    if not fits:
        raise place.mismatch(f"the file has factors of shape {list(down.shape)} and {list(up.shape)}")
    return down.to(dtype), up.to(dtype)


def _with_dimensions(factor: Tensor, dimensions: int) -> Tensor:
    """Turn a 1x1 convolution's factor into a linear layer's, or back: the same numbers, spelt with other shapes."""
    if factor.ndim == 4 and dimensions == 2 and factor.shape[2:] == (1, 1):
        return factor.flatten(1)
    if factor.ndim == 2 and dimensions == 4:
        return factor[:, :, None, None]
    return factor


def _with_middle(middle: Tensor, down: Tensor, place: TargetLayer) -> Tensor:
    """Multiply a convolution's middle factor [r, q, kh, kw] into its down factor [q, in, 1, 1]."""
    if middle.ndim != 4 or down.ndim != 4 or down.shape[2:] != (1, 1) or middle.shape[1] != down.shape[0]:
        raise place.mismatch(f"the file has a middle factor of shape {list(middle.shape)}")
    return torch.einsum("rqhw,qi->rihw", middle.float(), down.flatten(1).float())


def _magnitude(parts: Mapping[str, Tensor], place: TargetLayer) -> Tensor | None:
    """Return DoRA's magnitudes; kohya's may be per input instead, [1, in], which is another method."""
    kohya = parts.get("dora_scale")
    if kohya is not None and (kohya.ndim < 1 or kohya.shape[0] != place.layer.shape[0]):
        raise UnsupportedMethod(place.adapter, f"{place.label} has no magnitude per output")
    return _vector(parts.get("magnitude", kohya), "magnitude", place)


def _vector(tensor: Tensor | None, what: str, place: TargetLayer) -> Tensor | None:
    """Return a value per output of the layer, [out], however many dimensions of 1 the file spells beside it."""
    if tensor is None:
        return None
    if tensor.numel() != place.layer.shape[0] or max(tensor.shape, default=0) != tensor.numel():
        raise place.mismatch(f"the file has a {what} of shape {list(tensor.shape)}")
    return tensor.flatten().to(dtype_named(place.layer.dtype))


def _check_declared(scaling: Scaling | None, place: TargetLayer, *, rank: int, is_dora: bool, has_bias: bool) -> None:
    """Refuse tensors that contradict what the file's metadata says of them."""
    if scaling is None:
        return
    declared = scaling.rank_of(place.module)
    if declared is not None and declared != rank:
        raise place.malformed(f"has rank {rank}, but the file's metadata says {declared}")
    if scaling.is_dora is not None and scaling.is_dora != is_dora:
        raise place.malformed("has a magnitude or lacks it, against the file's metadata")
    if has_bias and scaling.has_bias is False:
        raise place.malformed("has a bias, against the file's metadata")
