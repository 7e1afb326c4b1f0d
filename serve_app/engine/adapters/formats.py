"""The parts of one layer in a file -> its change, checked against the layer of the base.

Owns which method the parts belong to, and what LoRA's and DoRA's mean. Results are in the layer's dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from serve_app.engine.adapters.deltas import (
    Delta,
    Dense,
    Direction,
    Dora,
    Hadamard,
    Kronecker,
    LowRank,
    dtype_named,
)
from serve_app.engine.adapters.lycoris import dense, hadamard, kronecker
from serve_app.engine.adapters.metadata import Scaling
from serve_app.engine.adapters.target_layers import TargetLayer, alpha_and_divisor, check_finite, check_rank
from serve_app.refusals import UnsupportedMethod

# The layers that read the picture: a base that takes more channels (inpainting, fill) has them behind the others.
INPUT_LAYERS = frozenset(("conv_in", "x_embedder", "img_in"))


class LayerParts(Mapping[str, Tensor]):
    """The parts of a layer, and which of them were read: an admitted file must hold no part that is not read."""

    def __init__(self, parts: Mapping[str, Tensor]) -> None:
        self._parts = dict(parts)
        self._read: set[str] = set()

    def __getitem__(self, part: str) -> Tensor:
        tensor = self._parts[part]
        self._read.add(part)
        return tensor

    def __contains__(self, part: object) -> bool:
        return part in self._parts

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    @property
    def unread(self) -> tuple[str, ...]:
        """The parts that were not read."""
        return tuple(part for part in self._parts if part not in self._read)


def build_delta(tensors: Mapping[str, Tensor], scaling: Scaling | None, target: TargetLayer) -> Delta:
    """Return one layer's change, made of every one of its tensors.

    Raises:
        ShapeMismatch: the factors do not fit the layer.
        RankTooHigh: the inner width is over the limit.
        MalformedFile: parts are missing, or contradict the file's metadata.
        NonFinite: a value is, or would become, NaN or infinite.
        UnsupportedMethod: the parts belong to no method that is served, or to several.
    """
    parts = LayerParts(tensors)
    _check_floats(tensors, target)
    direction = _direction(parts, scaling, target)
    magnitude, is_per_input = _magnitude(parts, target)
    if isinstance(direction, LowRank):
        has_bias = direction.bias is not None
        _check_declared(scaling, target, rank=direction.rank, is_dora=magnitude is not None, has_bias=has_bias)
    if parts.unread:
        raise UnsupportedMethod(
            target.adapter, f"{target.label} mixes several methods: '{parts.unread[0]}' is left over"
        )
    delta = direction if magnitude is None else Dora(direction, magnitude, is_per_input, "dora_scale" in tensors)
    check_finite(delta, target)
    return delta


def _direction(parts: LayerParts, scaling: Scaling | None, target: TargetLayer) -> Direction:
    if target.layer.kind == "norm" and "diff" not in parts and "diff_b" not in parts:
        raise UnsupportedMethod(target.adapter, f"{target.label} is a norm, which has no factors")
    if "down" in parts or "up" in parts:
        return _lora(parts, scaling, target)
    if any(part.startswith("hada_") for part in parts):
        return hadamard(parts, target)
    if any(part.startswith("lokr_") for part in parts):
        return kronecker(parts, target)
    if "diff" in parts or "diff_b" in parts:
        return dense(parts, target)
    raise target.malformed("lacks its factors")


def _check_floats(tensors: Mapping[str, Tensor], target: TargetLayer) -> None:
    for part, tensor in tensors.items():
        if part != "alpha" and not tensor.is_floating_point():
            raise target.malformed(
                f"has a '{part}' of type {str(tensor.dtype).removeprefix('torch.')}, which is no float"
            )


def inner_width(delta: Delta) -> int:
    """Return the rank of a change: for Kronecker products the right factor's smaller side, if full the layer's."""
    match delta:
        case LowRank():
            return delta.rank
        case Dora():
            return inner_width(delta.direction)
        case Hadamard():
            return delta.up_1.shape[1]
        case Kronecker():
            return min(delta.right.shape[:2])
        case Dense():
            return min(delta.weight.shape[:2])


def _lora(parts: Mapping[str, Tensor], scaling: Scaling | None, target: TargetLayer) -> LowRank:
    if "down" not in parts or "up" not in parts:
        raise target.malformed("lacks one of its two factors")
    down, up = _fitted(parts, target)
    alpha, divisor = alpha_and_divisor(parts, down.shape[0], scaling, target)
    bias, shift = parts.get("bias"), parts.get("diff_b")
    if shift is not None and not shift.any():
        shift = None  # some tools write zeros for every layer, whether or not it has a bias
    bias, shift = (_vector(tensor, "bias", target) for tensor in (bias, shift))
    if (bias is not None or shift is not None) and not target.layer.has_bias:
        raise target.mismatch("the file changes a bias that it does not have")
    return LowRank(down, up, alpha, divisor, bias, shift)


def _fitted(parts: Mapping[str, Tensor], target: TargetLayer) -> tuple[Tensor, Tensor]:
    """Return the factors in the layer's dtype and number of dimensions."""
    shape, dtype = target.layer.shape, dtype_named(target.layer.dtype)
    down, up = parts["down"], parts["up"]
    if "mid" in parts:
        down = _with_middle(parts["mid"], down, target)
    down, up = _with_dimensions(down, len(shape)), _with_dimensions(up, len(shape))
    if down.ndim != len(shape) or up.ndim != len(shape):
        raise target.mismatch(f"the file has factors of shape {list(down.shape)} and {list(up.shape)}")
    rank = down.shape[0]
    check_rank(rank, target)
    down = with_all_inputs(down, target)
    fits = down.shape[1:] == shape[1:] and up.shape == (shape[0], rank, *[1] * (len(shape) - 2))
    if not fits:
        raise target.mismatch(f"the file has factors of shape {list(down.shape)} and {list(up.shape)}")
    return down.to(dtype), up.to(dtype)


def _with_dimensions(factor: Tensor, dimensions: int) -> Tensor:
    """Turn a 1x1 convolution's factor into a linear layer's, or back: the same numbers, spelt with other shapes."""
    if factor.ndim == 4 and dimensions == 2 and factor.shape[2:] == (1, 1):
        return factor.flatten(1)
    if factor.ndim == 2 and dimensions == 4:
        return factor[:, :, None, None]
    return factor


def _with_middle(middle: Tensor, down: Tensor, target: TargetLayer) -> Tensor:
    """Multiply a convolution's middle factor [r, q, kh, kw] into its down factor [q, in, 1, 1]."""
    if middle.ndim != 4 or down.ndim != 4 or down.shape[2:] != (1, 1) or middle.shape[1] != down.shape[0]:
        raise target.mismatch(f"the file has a middle factor of shape {list(middle.shape)}")
    return torch.einsum("rqhw,qi->rihw", middle.float(), down.flatten(1).float())


def with_all_inputs(factor: Tensor, target: TargetLayer) -> Tensor:
    """Add zeros for the input channels that an adapter of the ordinary base does not know."""
    missing = target.layer.shape[1] - factor.shape[1]
    if target.module not in INPUT_LAYERS or missing <= 0:
        return factor
    return F.pad(factor, (*[0, 0] * (factor.ndim - 2), 0, missing))


def _magnitude(parts: LayerParts, target: TargetLayer) -> tuple[Tensor | None, bool]:
    """Return DoRA's magnitudes, and whether they are per input channel: LyCORIS and OneTrainer know both."""
    scale = parts.get("dora_scale")
    if scale is None:
        return _vector(parts.get("magnitude"), "magnitude", target), False
    inputs = target.layer.shape[1] if len(target.layer.shape) > 1 else 0
    if scale.ndim > 1 and scale.shape[0] == 1 and scale.shape[1] == scale.numel() == inputs:
        return scale.flatten().to(dtype_named(target.layer.dtype)), True
    return _vector(scale, "magnitude", target), False


def _vector(tensor: Tensor | None, what: str, target: TargetLayer) -> Tensor | None:
    """Return a value per output of the layer, [out], however many dimensions of 1 the file spells beside it."""
    if tensor is None:
        return None
    if tensor.numel() != target.layer.shape[0] or max(tensor.shape, default=0) != tensor.numel():
        raise target.mismatch(f"the file has a {what} of shape {list(tensor.shape)}")
    return tensor.flatten().to(dtype_named(target.layer.dtype))


def _check_declared(scaling: Scaling | None, target: TargetLayer, *, rank: int, is_dora: bool, has_bias: bool) -> None:
    """Refuse tensors that contradict what the file's metadata says of them."""
    if scaling is None:
        return
    declared = scaling.rank_of(target.module)
    if declared is not None and declared != rank:
        raise target.malformed(f"has rank {rank}, but the file's metadata says {declared:g}")
    if scaling.is_dora is not None and scaling.is_dora != is_dora:
        raise target.malformed("has a magnitude or lacks it, against the file's metadata")
    if has_bias and scaling.has_bias is False:
        raise target.malformed("has a bias, against the file's metadata")
