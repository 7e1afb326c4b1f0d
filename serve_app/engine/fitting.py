"""Where a change goes in the base, and the checks that every method shares.

Owns how a layer is named in errors, how alpha is resolved and which ranks are allowed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from serve_app.engine.manifest import Layer
from serve_app.engine.metadata import Scaling
from serve_app.refusals import MalformedFile, NonFinite, RankTooHigh, ShapeMismatch


@dataclass(frozen=True, slots=True)
class Place:
    """Where a change is made, and for whom errors are worded."""

    adapter: str
    component: str
    module: str
    layer: Layer
    max_rank: int

    @property
    def label(self) -> str:
        """What errors call the layer."""
        return f"layer {self.component}.{self.module}"

    def mismatch(self, what: str) -> ShapeMismatch:
        """Return the error for factors that do not fit the layer."""
        return ShapeMismatch(self.adapter, f"{self.label} has shape {list(self.layer.shape)} in the base, but {what}")

    def malformed(self, what: str) -> MalformedFile:
        """Return the error for a layer that is incomplete or contradicts itself."""
        return MalformedFile(self.adapter, f"{self.label} {what}")


def alpha_and_divisor(
    parts: Mapping[str, Tensor], rank: int, scaling: Scaling | None, place: Place
) -> tuple[float, float]:
    """Return alpha and its divisor: from the metadata, else from the layer's own alpha, else scale 1."""
    stored = parts.get("alpha")
    if scaling is not None:
        if stored is not None:
            raise place.malformed("has an alpha of its own beside the metadata's")
        return scaling.alpha_of(place.module), scaling.divisor_of(rank)
    if stored is None:
        return float(rank), float(rank)
    if stored.numel() != 1:
        raise place.malformed(f"has an alpha of {stored.numel()} values")
    alpha = float(stored.item())
    if not abs(alpha) < float("inf"):
        raise NonFinite(place.adapter, f"{place.label} has an alpha that is not finite")
    return alpha, float(rank)


def check_rank(rank: int, place: Place) -> None:
    """Refuse an inner width of zero or over the limit."""
    if rank < 1:
        raise place.malformed("has rank 0")
    if rank > place.max_rank:
        raise RankTooHigh(place.adapter, f"{place.label} has rank {rank}; the limit is {place.max_rank}")


def inputs_of(shape: tuple[int, ...]) -> int:
    """Return how many values one output of a layer reads: in, or in * kh * kw."""
    return int(torch.Size(shape[1:]).numel())
