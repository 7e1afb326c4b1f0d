"""The parameters of a base, which of them make up a layer, and the slabs that weights of one shape lie in.

Owns the record of where a parameter's values lie. Must not know adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor, nn

from serve_app.engine.adapters.stacks import empty_rows, layer_order

ParameterName = tuple[str, str]
# Adapters of one kind of training change the same layers; so many choices of layers are remembered.
_REMEMBERED_STACKS = 256
# On a CPU larger weights are fused block by block, and gain nothing from lying together.
LARGE_ELEMENTS = 1 << 18


@dataclass(slots=True, eq=False)
class ParameterSlot:
    """One parameter of the base: the values it was loaded with, and where in a slab they lie, if they do.

    `fused_buffers` are the tensors that fused values go to, one for each set, made when first asked for.
    """

    parameter: nn.Parameter
    pristine: Tensor
    slab: Slab | None = None
    row: int = 0
    fused_buffers: dict[int, Tensor] = field(default_factory=dict[int, Tensor])


class Slab:
    """The weights of linear layers of one component, shape and dtype, in one piece of memory: row i is slot i's.

    `values` [n, out, in] is what the layers were loaded with; `fused` has the same shape, one for each set of fused
    buffers, made when first asked for; `fused_rows` are its rows.
    """

    def __init__(self, slots: Sequence[ParameterSlot]) -> None:
        """Move the slots' values here; their parameters become views."""
        first = slots[0].pristine
        self.values = empty_rows(len(slots), first.shape, first.dtype, first.device)
        self.slots = tuple(slots)
        self.fused: dict[int, Tensor] = {}
        self.fused_rows: dict[int, tuple[Tensor, ...]] = {}
        for row, (slot, values) in enumerate(zip(slots, self.values.unbind(), strict=True)):
            slot.slab, slot.row = self, row
            slot.parameter.data = slot.pristine = values.copy_(slot.pristine)

    def fused_in(self, which: int) -> Tensor:
        """Return the fused buffers of a set."""
        buffers = self.fused.get(which)
        if buffers is None:
            first = self.values[0]
            buffers = self.fused[which] = empty_rows(len(self.slots), first.shape, first.dtype, first.device)
            rows = self.fused_rows[which] = tuple(buffers.unbind())
            for slot, row in zip(self.slots, rows, strict=True):
                slot.fused_buffers[which] = row
        return buffers

    def drop(self, which: int) -> None:
        """Give back the fused buffers of a set."""
        self.fused.pop(which, None)
        self.fused_rows.pop(which, None)
        for slot in self.slots:
            slot.fused_buffers.pop(which, None)


class LayerParameters(NamedTuple):
    """The parameters of one layer."""

    weight: ParameterSlot
    bias: ParameterSlot | None


Layers = Mapping[str, Mapping[str, LayerParameters]]


def layers_of(sites: Mapping[ParameterName, ParameterSlot]) -> dict[str, dict[str, LayerParameters]]:
    """Return component -> module -> its weight and bias, for every module that has a weight."""
    layers: dict[str, dict[str, LayerParameters]] = {component: {} for component, _ in sites}
    for (component, name), site in sites.items():
        module = name.removesuffix(".weight")
        if module != name:
            layers[component][module] = LayerParameters(site, sites.get((component, f"{module}.bias")))
    return layers


def layers_among(layers: Layers, names: Mapping[str, Collection[str]]) -> dict[str, dict[str, LayerParameters]]:
    """Return the layers of these names: component -> modules."""
    return {
        component: {module: layer for module, layer in modules.items() if module in names[component]}
        for component, modules in layers.items()
    }


def lay_in_slabs(layers: Layers) -> list[Slab]:
    """Move the weights of linear layers together that have one shape; returns the slabs.

    On a GPU it takes the memory of the largest slab for a while.
    """
    slabs: list[Slab] = []
    for modules in layers.values():
        groups: dict[object, list[ParameterSlot]] = {}
        for module in sorted(modules, key=layer_order):
            slot = modules[module].weight
            if _fits_slab(slot.pristine):
                groups.setdefault((slot.pristine.shape, slot.pristine.dtype), []).append(slot)
        slabs += [Slab(slots) for slots in groups.values()]
    return slabs


def _fits_slab(weight: Tensor) -> bool:
    is_small = weight.device.type != "cpu" or weight.numel() <= LARGE_ELEMENTS
    return weight.ndim == 2 and weight.is_contiguous() and weight.is_floating_point() and is_small


class Run(NamedTuple):
    """Layers `start` to `stop` of a stack, whose weights are rows from `row` of one slab, or of none."""

    start: int
    stop: int
    slab: Slab | None
    row: int
    is_first: bool

    @property
    def rows(self) -> slice:
        """The rows of the slab."""
        return slice(self.row, self.row + self.stop - self.start)


def runs_of(slots: Sequence[ParameterSlot], fused: Collection[ParameterSlot]) -> Iterator[Run]:
    """Cut a stack's slots where the next one lies elsewhere; `is_first` where none of a run is among `fused`."""
    start = 0
    for stop in range(1, len(slots) + 1):
        first = slots[start]
        is_first = first not in fused
        if stop < len(slots):
            slot = slots[stop]
            is_next = slot.slab is first.slab is not None and slot.row == first.row + stop - start
            if is_next and (slot not in fused) == is_first:
                continue
        yield Run(start, stop, first.slab, first.row, is_first)
        start = stop


class StackPlaces(NamedTuple):
    """Where the weights of a stack's layers lie: their slots, and the runs of them where none is fused yet."""

    slots: tuple[ParameterSlot, ...]
    runs: tuple[Run, ...]


FindPlaces = Callable[[str, tuple[str, ...]], StackPlaces]


def remembered_places(layers: Layers) -> FindPlaces:
    """Return what finds the places of a component's modules, and remembers them; it raises KeyError for others."""

    @lru_cache(_REMEMBERED_STACKS)
    def find(component: str, modules: tuple[str, ...]) -> StackPlaces:
        slots = tuple(layers[component][module].weight for module in modules)
        return StackPlaces(slots, tuple(runs_of(slots, ())))

    return find
