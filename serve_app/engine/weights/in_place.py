"""Fusing where the weights lie, for a device that has no room for a second set: the pristine values are on the host.

Owns the host copies, and which parameters hold something else than their pristine values. Must not know files,
requests or which adapter comes next. Used by one thread, on one stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from serve_app.core import AdapterSetKey, Scale, scale_of
from serve_app.engine.adapters.deltas import Delta, Dora, LowRankStack, ParsedAdapter
from serve_app.engine.adapters.host_buffer import page_locked
from serve_app.engine.adapters.stacks import stack_layers
from serve_app.engine.weights.device_cache import HoldAdapters
from serve_app.engine.weights.fuse import StackFuser, changes_bias, fuse_bias, fuse_weight
from serve_app.engine.weights.parameters import Layers, ParameterSlot, Slab, remembered_places

_ALIGNMENT_BYTES = 64
# A page-locked piece takes milliseconds to get, so that small tensors share one.
_PIECE_BYTES = 256 << 20


class InPlaceFuser:
    """The layers that adapters may change, each with a copy on the host of what was loaded.

    Invariants: the copies are never written; a parameter keeps its memory for ever, and holds its pristine values
    unless it is known to be written. After a failure `restore` makes the base whole again. Nothing can be fused ahead.
    """

    fused_bytes = 0
    kept = frozenset[AdapterSetKey]()

    def __init__(self, layers: Layers, slabs: Sequence[Slab], hold: HoldAdapters) -> None:
        """Copy the layers' parameters to the host, page-locked where they lie on a GPU; reads every byte once."""
        self._layers, self._hold = layers, hold
        self._stacks = StackFuser()
        self._places = remembered_places(layers)
        self._written: set[ParameterSlot] = set()
        self._copies = dict(zip(slabs, host_copies([slab.values for slab in slabs]), strict=True))
        every = [slot for modules in layers.values() for layer in modules.values() for slot in layer if slot]
        self.slots = frozenset(every)
        """The parameters that have a copy."""
        for slab, copy in self._copies.items():
            for slot, values in zip(slab.slots, copy.unbind(), strict=True):
                slot.pristine = values
        alone = [slot for slot in every if slot.slab is None]
        for slot, copy in zip(alone, host_copies([slot.pristine for slot in alone]), strict=True):
            slot.pristine = copy

    def is_modified(self, slot: ParameterSlot) -> bool:
        """Whether a parameter may hold something else than its pristine values."""
        return slot in self._written

    def prepare(
        self, key: AdapterSetKey, adapters: Sequence[ParsedAdapter], scales: Sequence[Scale]
    ) -> Callable[[], None]:
        """Look up every layer, and write nothing; returns what fuses.

        Raises:
            KeyError: there is no such layer.
        """
        for adapter in adapters:
            self._check(adapter)
        return partial(self.apply, key, adapters, scales)

    def apply(self, key: AdapterSetKey, adapters: Sequence[ParsedAdapter], scales: Sequence[Scale]) -> None:
        """Write the base with these adapters, in this order; a failure leaves it half written, for `restore`."""
        for adapter in adapters:
            self._check(adapter)
        self.restore()
        with torch.no_grad(), self._hold(adapters) as residents:
            for adapter, scale in zip(residents, scales, strict=True):
                for stack in adapter.stacks:
                    self._fuse_stack(stack, scale_of(scale, stack.component))
                for component, module, delta in adapter.singles:
                    self._fuse_single(component, module, delta, scale_of(scale, component))

    def restore(self) -> None:
        """Copy the pristine values back to every parameter that was written."""
        with torch.no_grad():
            for slab, copy in self._copies.items():
                written = sorted(slot.row for slot in self._written if slot.slab is slab)
                for rows in _ranges(written):
                    slab.values[rows].copy_(copy[rows], non_blocking=True)
            for slot in self._written:
                if slot.slab is None:
                    slot.parameter.data.copy_(slot.pristine, non_blocking=True)
        self._written.clear()  # only now, so that the next call repeats the work of one that failed

    def reserve(self, sets: int) -> None:
        """Do nothing: there are no buffers."""

    def drop_spares(self) -> None:
        """Do nothing: there are no buffers."""

    def _check(self, adapter: ParsedAdapter) -> None:
        layers = stack_layers(adapter.components)
        for stack in layers.stacks:
            self._places(stack.component, stack.modules)
        for component, module, _ in layers.singles:
            self._layers[component][module]

    def _fuse_stack(self, stack: LowRankStack, scale: float) -> None:
        slots, runs = self._places(stack.component, stack.modules)
        singles = None
        for run in runs:
            if run.slab is None:
                singles = singles or list(stack.layers())
                for module, delta in singles[run.start : run.stop]:
                    self._fuse_single(stack.component, module, delta, scale)
                continue
            part = slice(run.start, run.stop)
            self._written.update(slots[part])
            live = run.slab.values[run.rows]
            self._stacks.fuse(live, None, stack.ups[part], stack.downs[part], stack.factor(scale))

    def _fuse_single(self, component: str, module: str, delta: Delta, scale: float) -> None:
        weight, bias = self._layers[component][module]
        live, is_first = weight.parameter.data, weight not in self._written
        self._written.add(weight)
        # The norm of a DoRA is that of the pristine weight.
        is_apart = isinstance(delta, Dora) and not is_first
        pristine = weight.pristine.to(live.device, non_blocking=True) if is_apart else live
        fuse_weight(live, pristine, live, delta, scale)
        if changes_bias(delta):
            assert bias is not None
            self._written.add(bias)
            fuse_bias(bias.parameter.data, bias.parameter.data, delta, scale)


def _ranges(rows: Sequence[int]) -> list[slice]:
    """Return the rows, which grow, as ranges."""
    ranges: list[slice] = []
    for row in rows:
        if ranges and ranges[-1].stop == row:
            ranges[-1] = slice(ranges[-1].start, row + 1)
        else:
            ranges.append(slice(row, row + 1))
    return ranges


def host_copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy tensors to the host, with their strides where they lie dense; page-locked where they lie on a GPU."""
    copies: list[Tensor] = []
    piece, used = torch.empty(0, dtype=torch.uint8), 0
    for tensor in tensors:
        is_on_gpu = tensor.device.type == "cuda"
        if used + tensor.nbytes > piece.nbytes:
            size = max(tensor.nbytes, _PIECE_BYTES if is_on_gpu else 0)
            locked = page_locked(size) if is_on_gpu else None
            piece, used = torch.empty(size, dtype=torch.uint8) if locked is None else locked, 0
        strides = torch.empty_like(tensor, device="meta").stride()
        values = (
            piece[used : used + tensor.nbytes]
            .view(tensor.dtype)
            .as_strided(tensor.shape, strides, used // tensor.itemsize)
        )
        copies.append(values.copy_(tensor))
        used += -(-tensor.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    return copies
