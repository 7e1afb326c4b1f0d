"""Fusing where the weights lie, for a device that has no room for a second set: the pristine values are on the host.

Owns the host copies, and which parameters hold something else than their pristine values. Must not know files,
requests or which adapter comes next. Used by one thread, on one stream.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from serve_app.core import Scale, scale_of
from serve_app.engine.adapters.deltas import Dora, ParsedAdapter
from serve_app.engine.weights.fuse import LayerUpdate, changes_bias, fuse_bias, fuse_weight, fuse_weights
from serve_app.engine.weights.parameters import Layers, ParameterSlot

_ALIGNMENT_BYTES = 64
# Torch rounds page-locked memory up to a power of two, so that it is taken in pieces of this size.
_PIECE_BYTES = 256 << 20


class InPlaceFuser:
    """The layers that adapters may change, each with a copy on the host of what was loaded.

    Invariants: the copies are never written; a parameter keeps its memory for ever, and holds its pristine values
    unless it is known to be written. After a failure `restore` makes the base whole again.
    """

    def __init__(self, layers: Layers) -> None:
        """Copy the layers' parameters to the host, page-locked where they lie on a GPU; reads every byte once."""
        self._layers = layers
        self._written: set[ParameterSlot] = set()
        every = [site for modules in layers.values() for layer in modules.values() for site in layer if site]
        self.sites = frozenset(every)
        """The parameters that have a copy."""
        for site, copy in zip(every, host_copies([site.parameter.data for site in every]), strict=True):
            site.pristine = copy

    def is_modified(self, site: ParameterSlot) -> bool:
        """Whether a parameter may hold something else than its pristine values."""
        return site in self._written

    def check(self, adapter: ParsedAdapter) -> None:
        """Look up every layer of an adapter, and write nothing.

        Raises:
            KeyError: there is no such layer.
        """
        for component, module, _ in adapter.layers():
            self._layers[component][module]

    def restore(self) -> None:
        """Copy the pristine values back to every parameter that was written."""
        with torch.no_grad():
            for site in self._written:
                site.parameter.data.copy_(site.pristine, non_blocking=True)
        self._written.clear()  # only now: what a failure left undone is done by the next call

    def fuse(self, adapters: Sequence[ParsedAdapter], scales: Sequence[Scale]) -> None:
        """Write the base with these adapters, in this order; a failure leaves it half written, for `restore`."""
        for adapter in adapters:
            self.check(adapter)
        self.restore()
        with torch.no_grad():
            for adapter, scale in zip(adapters, scales, strict=True):
                for component in adapter.components:
                    self._fuse_component(adapter, component, scale_of(scale, component))

    def _fuse_component(self, adapter: ParsedAdapter, component: str, scale: float) -> None:
        changes: list[LayerUpdate] = []
        for module, delta in adapter.components[component].items():
            layer = self._layers[component][module]
            live, is_first = layer.weight.parameter.data, layer.weight not in self._written
            self._written.add(layer.weight)
            if isinstance(delta, Dora):
                # Its norm is that of the pristine weight. One by one: the copies on the device must not add up.
                pristine = live if is_first else layer.weight.pristine.to(live.device, non_blocking=True)
                fuse_weight(live, pristine, live, delta, scale)
            else:
                changes.append(LayerUpdate(live, live, live, delta, scale))
            if changes_bias(delta):
                assert layer.bias is not None
                self._written.add(layer.bias)
                fuse_bias(layer.bias.parameter.data, layer.bias.parameter.data, delta, scale)
        fuse_weights(changes)


def host_copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy tensors to the host, with their strides where they lie dense; page-locked where they lie on a GPU."""
    copies: list[Tensor] = []
    piece, used = torch.empty(0, dtype=torch.uint8), 0
    for tensor in tensors:
        is_pinned = tensor.device.type == "cuda"
        if used + tensor.nbytes > piece.nbytes or piece.is_pinned() != is_pinned:
            size = max(tensor.nbytes, _PIECE_BYTES if is_pinned else 0)
            piece, used = torch.empty(size, dtype=torch.uint8, pin_memory=is_pinned), 0
        strides = torch.empty_like(tensor, device="meta").stride()
        values = (
            piece[used : used + tensor.nbytes]
            .view(tensor.dtype)
            .as_strided(tensor.shape, strides, used // tensor.itemsize)
        )
        copies.append(values.copy_(tensor))
        used += -(-tensor.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    return copies
