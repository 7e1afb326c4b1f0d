"""A made-up adapter, applied and removed before the first caller comes.

Owns what it changes: every linear layer that adapters may change. So fused buffers, library handles and kernels exist,
and the device has been tried for which products it multiplies exactly in one call.
"""

from __future__ import annotations

import logging

import torch

from serve_app.engine.adapters.deltas import Coverage, Delta, LowRank, ParsedAdapter, dtype_named
from serve_app.engine.base.manifest import BaseManifest
from serve_app.engine.weights.fused import FusedWeights
from serve_app.engine.weights.placement import WeightPlacement
from serve_app.engine.weights.shortage import is_out_of_memory

log = logging.getLogger(__name__)
RANK = 16


def made_up_adapter(manifest: BaseManifest, rank: int = RANK) -> ParsedAdapter:
    """Return an adapter of random factors over all linear layers of a base."""
    random = torch.Generator().manual_seed(0)

    def change(shape: tuple[int, ...], dtype: torch.dtype) -> Delta:
        down, up = (torch.randn(size, generator=random).to(dtype) for size in ((rank, shape[1]), (shape[0], rank)))
        return LowRank(down, up, float(rank), float(rank))

    components = {
        component: {
            name: change(layer.shape, dtype_named(layer.dtype))
            for name, layer in layers.items()
            if layer.kind == "linear"
        }
        for component, layers in manifest.components.items()
    }
    return ParsedAdapter("made-up", components, Coverage(0, 0))


def warm_swaps(weights: FusedWeights, manifest: BaseManifest, placement: WeightPlacement) -> None:
    """Take the fused buffers' memory, and apply and remove a made-up adapter; a shortage is logged, not raised."""
    try:
        weights.reserve(ahead=placement.prefetches_swap)
        weights.apply([(made_up_adapter(manifest), 1.0)])
        weights.apply([])
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        log.warning("no room to try a swap before the first caller: %s", str(error).partition("\n")[0])
        weights.restore()
        weights.drop_spares()
    weights.forget("made-up")
