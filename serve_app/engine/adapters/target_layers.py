"""Where a change goes in the base, and the checks that every method shares.

Owns how a layer is named in errors, how alpha is resolved and which ranks are allowed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
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
    tensors_of,
)
from serve_app.engine.adapters.metadata import Scaling
from serve_app.engine.base.manifest import Layer
from serve_app.refusals import MalformedFile, NonFinite, RankTooHigh, ShapeMismatch


@dataclass(frozen=True, slots=True)
class TargetLayer:
    """Where a change is made, and for whom errors are worded."""

    adapter: str
    component: str
    module: str
    layer: Layer
    max_rank: int

    @property
    def label(self) -> str:
        """The layer's name in errors."""
        return f"layer {self.component}.{self.module}"

    def mismatch(self, what: str) -> ShapeMismatch:
        """Return the error for factors that do not fit the layer."""
        return ShapeMismatch(self.adapter, f"{self.label} has shape {list(self.layer.shape)} in the base, but {what}")

    def malformed(self, what: str) -> MalformedFile:
        """Return the error for a layer that is incomplete or contradicts itself."""
        return MalformedFile(self.adapter, f"{self.label} {what}")


def alpha_and_divisor(
    parts: Mapping[str, Tensor], rank: int, scaling: Scaling | None, target: TargetLayer
) -> tuple[float, float]:
    """Return alpha and its divisor: from the metadata, else from the layer's own alpha, else scale 1."""
    stored = parts.get("alpha")
    if scaling is not None:
        if stored is not None:
            raise target.malformed("has an alpha of its own beside the metadata's")
        return scaling.alpha_of(target.module), scaling.divisor_of(rank)
    if stored is None:
        return float(rank), float(rank)
    if stored.numel() != 1:
        raise target.malformed(f"has an alpha of {stored.numel()} values")
    alpha = float(stored.item())
    if not abs(alpha) < float("inf"):
        raise NonFinite(target.adapter, f"{target.label} has an alpha that is not finite")
    return alpha, float(rank)


def check_rank(rank: int, target: TargetLayer) -> None:
    """Refuse an inner width of zero or over the limit."""
    if rank < 1:
        raise target.malformed("has rank 0")
    if rank > target.max_rank:
        raise RankTooHigh(target.adapter, f"{target.label} has rank {rank}; the limit is {target.max_rank}")


def inputs_of(shape: tuple[int, ...]) -> int:
    """Return how many values one output of a layer reads: in, or in * kh * kw."""
    return int(torch.Size(shape[1:]).numel())


# A fused weight must stay in range at the largest scale a request may ask for, and with other adapters beside it.
HEADROOM = 64.0
# No training gives weights of this size: it is a broken alpha, and would overflow in the activations.
MAX_CHANGE = 1e6


def check_finite(delta: Delta, target: TargetLayer) -> None:
    """Refuse NaN and infinity in a change's tensors, and products that leave the range of the layer's dtype.

    The product is bounded from its factors; only where that bound is too high is it computed.
    """
    peaks = {id(tensor): _peak(tensor) for tensor in tensors_of(delta)}
    if not all(peak < float("inf") for peak in peaks.values()):  # false for NaN too
        raise NonFinite(target.adapter, f"{target.label} has NaN or infinite values")
    limit = min(torch.finfo(dtype_named(target.layer.dtype)).max / HEADROOM, MAX_CHANGE)
    change = delta.direction if isinstance(delta, Dora) else delta
    factor = 1.0 if isinstance(change, Dense) else max(1.0, abs(change.alpha / change.divisor))
    bound = _bound(change, lambda tensor: peaks[id(tensor)])
    if bound * factor >= limit and not _exact_peak(change) * factor < limit:
        raise NonFinite(target.adapter, f"{target.label} overflows in {target.layer.dtype}")


def _peak(tensor: Tensor) -> float:
    low, high = torch.aminmax(tensor)
    return torch.maximum(-low, high).item()


def _bound(delta: Direction, peak: Callable[[Tensor], float]) -> float:
    match delta:
        case LowRank():
            bias = max((peak(bias) for bias in (delta.bias, delta.shift) if bias is not None), default=0.0)
            return max(bias, delta.rank * peak(delta.down) * peak(delta.up))
        case Hadamard():
            rank = delta.up_1.shape[1] * delta.up_2.shape[1]
            return rank * peak(delta.up_1) * peak(delta.down_1) * peak(delta.up_2) * peak(delta.down_2)
        case Kronecker():
            return peak(delta.left) * peak(delta.right)
        case Dense():
            return max(peak(tensor) for tensor in tensors_of(delta))


def _exact_peak(delta: Direction) -> float:
    match delta:
        case LowRank():
            bias = max((_peak(bias) for bias in (delta.bias, delta.shift) if bias is not None), default=0.0)
            return max(bias, _peak(delta.up.flatten(1).double() @ delta.down.flatten(1).double()))
        case Hadamard():
            first = delta.up_1.double() @ delta.down_1.double()
            return _peak(first * (delta.up_2.double() @ delta.down_2.double()))
        case Kronecker():
            return _peak(delta.left) * _peak(delta.right)
        case Dense():
            return max(_peak(tensor) for tensor in tensors_of(delta))
