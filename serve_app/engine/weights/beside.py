"""Fusing into buffers beside the pristine weights, which stay on the device and are never written.

Owns the buffers and which of them are bound. Must not know files, requests or which adapter comes next.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from serve_app.core import AdapterSetKey, Scale, scale_of
from serve_app.engine.adapters.deltas import Delta, LowRankStack, ParsedAdapter
from serve_app.engine.weights.device_cache import HoldAdapters
from serve_app.engine.weights.fuse import StackFuser, changes_bias, fuse_bias, fuse_weight
from serve_app.engine.weights.parameters import Layers, ParameterSlot, Slab, remembered_places, runs_of
from serve_app.engine.weights.side_stream import SideStream

Fused = Mapping[ParameterSlot, Tensor]


class BesideFuser:
    """Sets of fused buffers, each with one composition, of which one at most is bound.

    Invariants: a composition is fused into one set as a whole; `prepare` never writes the set that is bound, and needs
    two. A composition that is in a set is bound from there; others take the set that was bound least recently. A buffer
    is made when an adapter first touches its layer, those of a slab together, and kept for the next.
    """

    def __init__(
        self,
        slots: Sequence[ParameterSlot],
        layers: Layers,
        slabs: Sequence[Slab],
        side: SideStream,
        hold: HoldAdapters,
        *,
        sets: int,
    ) -> None:
        self._slots, self._layers, self._slabs, self._sets = slots, layers, slabs, sets
        self._side, self._hold = side, hold
        self._stacks = StackFuser()
        self._places = remembered_places(layers)
        self._bound: Fused = {}
        self._bound_key: AdapterSetKey = ()
        # Least recently used first.
        self._kept: OrderedDict[AdapterSetKey, tuple[int, Fused]] = OrderedDict()

    @property
    def fused_bytes(self) -> int:
        """The memory that fused buffers take, bound or not."""
        return sum(buffer.nbytes for slot in self._slots for buffer in slot.fused_buffers.values())

    @property
    def kept(self) -> frozenset[AdapterSetKey]:
        """The compositions that are in buffers, and the base; not while `prepare` runs in another thread."""
        return frozenset((*self._kept, ()))

    def prepare(
        self, key: AdapterSetKey, adapters: Sequence[ParsedAdapter], scales: Sequence[Scale]
    ) -> Callable[[], None]:
        """Fuse into a set that is not bound; returns what binds it."""
        if key not in self.kept:
            self._keep(key, adapters, scales, self._free_set(max(self._sets, 2), is_bound_free=False))
        return partial(self._bind, key)

    def apply(self, key: AdapterSetKey, adapters: Sequence[ParsedAdapter], scales: Sequence[Scale]) -> None:
        """Fuse into a free set, or where there is none the one that is bound, and bind it."""
        self._side.record_read_done()
        if key not in self.kept:
            self._keep(key, adapters, scales, self._free_set(self._sets, is_bound_free=True))
        self._bind(key)

    def restore(self) -> None:
        """Bind the pristine tensors everywhere."""
        self._side.wait_stream()
        for slot in self._slots:
            if slot.parameter.data_ptr() != slot.pristine.data_ptr():
                slot.parameter.data = slot.pristine
        self._bound, self._bound_key = {}, ()
        self._side.record_read_done()

    def reserve(self, sets: int) -> None:
        """Make the buffers of every slab now, for one set or two."""
        with self._side.stream_scope():
            for slab in self._slabs:
                for which in range(sets):
                    slab.fused_in(which)

    def drop_spares(self) -> None:
        """Give back the buffers of which nothing is bound."""
        bound_set, _ = self._kept.get(self._bound_key, (None, None))
        self._kept = OrderedDict((key, kept) for key, kept in self._kept.items() if key == self._bound_key)
        for which in {which for slot in self._slots for which in slot.fused_buffers}:
            in_use = self._bound.keys() if which == bound_set else frozenset[ParameterSlot]()
            for slab in self._slabs:
                if in_use.isdisjoint(slab.slots):
                    slab.drop(which)
            for slot in self._slots:
                if slot.slab is None and slot not in in_use:
                    slot.fused_buffers.pop(which, None)

    def _free_set(self, sets: int, *, is_bound_free: bool) -> int:
        """Return a set that may be written; the composition in it is kept no more."""
        used = {which for which, _ in self._kept.values()}
        unused = next((which for which in range(sets) if which not in used), None)
        if unused is not None:
            return unused
        others = (key for key in self._kept if key != self._bound_key)
        oldest = next(others, self._bound_key if is_bound_free else None)
        assert oldest is not None
        which, _ = self._kept.pop(oldest)
        return which

    def _keep(self, key: AdapterSetKey, adapters: Sequence[ParsedAdapter], scales: Sequence[Scale], which: int) -> None:
        self._kept[key] = which, self._fuse(adapters, scales, which)

    def _bind(self, key: AdapterSetKey) -> None:
        fused: Fused = {}
        if key:
            _, fused = self._kept[key]
            self._kept.move_to_end(key)
        self._side.wait_stream()
        for slot in self._bound.keys() - fused.keys():
            slot.parameter.data = slot.pristine
        for slot, buffer in fused.items():
            slot.parameter.data = buffer
        self._bound, self._bound_key = fused, key
        self._side.record_read_done()

    def _fuse(self, adapters: Sequence[ParsedAdapter], scales: Sequence[Scale], which: int) -> Fused:
        fused: dict[ParameterSlot, Tensor] = {}
        with torch.no_grad(), self._side.stream_scope(), self._hold(adapters) as residents:
            for adapter, scale in zip(residents, scales, strict=True):
                earlier = frozenset(fused)  # an adapter changes each layer once
                for stack in adapter.stacks:
                    self._fuse_stack(stack, scale_of(scale, stack.component), earlier, fused, which)
                for component, module, delta in adapter.singles:
                    self._fuse_single(component, module, delta, scale_of(scale, component), fused, which)
        return fused

    def _fuse_stack(
        self,
        stack: LowRankStack,
        scale: float,
        earlier: Collection[ParameterSlot],
        fused: dict[ParameterSlot, Tensor],
        which: int,
    ) -> None:
        slots, runs = self._places(stack.component, stack.modules)
        singles = None
        for run in runs_of(slots, earlier) if earlier else runs:
            if run.slab is None:
                singles = singles or list(stack.layers())
                for module, delta in singles[run.start : run.stop]:
                    self._fuse_single(stack.component, module, delta, scale, fused, which)
                continue
            outs, part = run.slab.fused_in(which)[run.rows], slice(run.start, run.stop)
            pristine = run.slab.values[run.rows] if run.is_first else None
            self._stacks.fuse(outs, pristine, stack.ups[part], stack.downs[part], stack.factor(scale))
            fused.update(zip(slots[part], run.slab.fused_rows[which][run.rows], strict=True))

    def _fuse_single(
        self, component: str, module: str, delta: Delta, scale: float, fused: dict[ParameterSlot, Tensor], which: int
    ) -> None:
        weight, bias = self._layers[component][module]
        current = fused.get(weight, weight.pristine)
        out = fused[weight] = _buffer_of(weight, which)
        fuse_weight(out, weight.pristine, current, delta, scale)
        if changes_bias(delta):
            assert bias is not None
            current = fused.get(bias, bias.pristine)
            out = fused[bias] = _buffer_of(bias, which)
            fuse_bias(out, current, delta, scale)


def _buffer_of(slot: ParameterSlot, which: int) -> Tensor:
    """Return a slot's buffer in a set, made where there is none."""
    if slot.slab is not None:
        slot.slab.fused_in(which)
    buffer = slot.fused_buffers.get(which)
    if buffer is None:
        buffer = slot.fused_buffers[which] = torch.empty_like(slot.pristine)
    return buffer
