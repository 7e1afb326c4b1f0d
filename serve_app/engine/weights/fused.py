"""Exact application of adapters to a base's live weights.

Owns the order of preparing, binding and restoring, and what is bound. Must not know files, requests or which adapter
comes next. Used by one thread, the device thread; `prepare` alone may run in another while a pass runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from serve_app.core import AdapterSetKey, Scale
from serve_app.engine.adapters.deltas import ParsedAdapter, bytes_of
from serve_app.engine.base.manifest import adaptable_layers
from serve_app.engine.base.packing import is_quantised, plain_tensors
from serve_app.engine.weights.beside import BesideFuser
from serve_app.engine.weights.device_cache import DeviceCache, HoldAdapters, as_they_are
from serve_app.engine.weights.in_place import InPlaceFuser
from serve_app.engine.weights.parameters import ParameterName, ParameterSlot, lay_in_slabs, layers_among, layers_of
from serve_app.engine.weights.side_stream import SideStream
from serve_app.engine.weights.unfused import UnfusedAdapters

AdapterSet = Sequence[tuple[ParsedAdapter, Scale]]
# The key of weights that are being written: equal to no composition, so that the next one is applied.
_NONE: AdapterSetKey = (("", 0.0),)


class StalePreparation(Exception):
    """The prepared swap has been written over since, and must not be bound."""


class Fuser(Protocol):
    """A way to bring adapters to a base: fused beside its weights or where they lie, or beside its layers."""

    @property
    def fused_bytes(self) -> int:
        """The memory that fused buffers take."""
        ...

    @property
    def kept(self) -> frozenset[AdapterSetKey]:
        """The compositions that can be bound without any arithmetic."""
        ...

    def prepare(
        self, key: AdapterSetKey, adapters: Sequence[ParsedAdapter], scales: Sequence[Scale]
    ) -> Callable[[], None]:
        """Do what can be done without a change to what is bound; returns what does the rest."""
        ...

    def apply(self, key: AdapterSetKey, adapters: Sequence[ParsedAdapter], scales: Sequence[Scale]) -> None:
        """Bind the base with these adapters; a failure leaves anything bound, for `restore`."""
        ...

    def restore(self) -> None:
        """Bind the base."""
        ...

    def reserve(self, sets: int) -> None:
        """Take the memory of so many sets of fused buffers now."""
        ...

    def drop_spares(self) -> None:
        """Give back all memory that nothing bound needs."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class PreparedSwap:
    """A composition fused and ready to be bound; good until the next one is prepared or applied.

    It refers to no adapter, and what it was made of may go; but where the pristine weights are on the host nothing can
    be fused beforehand, and it is no more than the composition.
    """

    key: AdapterSetKey
    version: int
    finish: Callable[[], None] = field(repr=False)


class FusedWeights:
    """The weights of a base's components, as loaded or with adapters fused in.

    Invariants: the tensors that were loaded are never written; the bound weights depend on the composition alone, never
    on earlier ones; every parameter keeps its identity and needs no gradient; `prepare` never writes what is
    bound; after a failure to apply, the base is bound. Fused buffers exist only for slabs and parameters that some
    adapter touched, unless `reserve` made them; all are kept for the next. Compositions that were fused stay in up to
    `fused_sets` sets of them, and changing to one of these binds it and computes nothing.
    With the pristine weights on the host there are no buffers: live parameters are written where they lie, every layer
    that adapters may change has a copy on the host, and it is the copies that are never written.
    Where a layer is quantised, nothing is fused: adapters lie beside all layers, and add to what these compute.
    Construct after the components are on their device and in their dtype: weights of linear layers that have one
    shape are moved together.
    """

    def __init__(
        self,
        components: Mapping[str, nn.Module],
        *,
        device_cache_bytes: int = 0,
        base_weights: Literal["device", "host"] = "device",
        fused_sets: int = 1,
    ) -> None:
        """Take over the components.

        Args:
            components: The modules whose weights adapters may change, by name.
            device_cache_bytes: The most GPU memory for adapters that are used again and again.
            base_weights: "host" takes host memory for all layers that adapters may change, and none of the device.
            fused_sets: How many sets of fused buffers there may be; preparing ahead takes a second one in any case.
        """
        self._slots: dict[ParameterName, ParameterSlot] = {}
        self._tensors: dict[ParameterName, Tensor] = {}
        is_unfused = any(map(is_quantised, components.values()))
        for component, module in components.items():
            # matmul picks its kernel by requires_grad, so that a base's own bits would depend on its history.
            module.requires_grad_(False)
            if is_unfused:
                self._tensors |= {(component, name): tensor for name, tensor in plain_tensors(module)}
                continue
            parameters = module.named_parameters()
            self._slots |= {
                (component, name): ParameterSlot(parameter, parameter.data) for name, parameter in parameters
            }
            self._tensors |= {(component, name): value for name, value in module.named_buffers()}
        device = next((tensor.device for tensor in self._loaded().values()), torch.device("cpu"))
        is_apart = device.type != "cpu"  # adapters come from another memory
        self._cache = DeviceCache(device_cache_bytes, device) if is_apart else None
        self._applied: AdapterSetKey = ()
        self._version = 0
        self._live: dict[str, ParameterSlot] = {}
        hold = as_they_are if self._cache is None else self._cache.holding
        self._fuser: Fuser = (
            UnfusedAdapters(components, hold)
            if is_unfused
            else self._fuser_for(components, device, base_weights, fused_sets, hold)
        )

    def _fuser_for(
        self,
        components: Mapping[str, nn.Module],
        device: torch.device,
        base_weights: Literal["device", "host"],
        fused_sets: int,
        hold: HoldAdapters,
    ) -> Fuser:
        layers = layers_of(self._slots)
        names = {component: adaptable_layers(module) for component, module in components.items()}
        adaptable = layers_among(layers, names)
        slabs = lay_in_slabs(adaptable)
        if base_weights == "device":
            return BesideFuser(tuple(self._slots.values()), layers, slabs, SideStream(device), hold, sets=fused_sets)
        fuser = InPlaceFuser(adaptable, slabs, hold)
        self._live = {".".join(("live", *name)): slot for name, slot in self._slots.items() if slot in fuser.slots}
        self._is_written = fuser.is_modified
        return fuser

    @property
    def applied(self) -> AdapterSetKey:
        """The bound composition: (digest, scale) of each adapter, in order; empty for the base."""
        return self._applied

    @property
    def kept(self) -> frozenset[AdapterSetKey]:
        """The compositions to which a change computes nothing."""
        return self._fuser.kept

    @property
    def fused_buffer_bytes(self) -> int:
        """The memory that fused buffers take, bound or not."""
        return self._fuser.fused_bytes

    @property
    def cached(self) -> tuple[str, ...]:
        """The digests of the adapters on the device, least recently used first; from any thread."""
        return () if self._cache is None else self._cache.resident

    def forget(self, digest: str) -> None:
        """Have an adapter's copy on the device dropped at the next swap; from any thread."""
        if self._cache is not None:
            self._cache.forget(digest)

    @property
    def base_tensors(self) -> dict[str, Tensor]:
        """The loaded tensors, parameters and buffers, by component and name, regardless of what is bound now.

        They are never written: with the pristine weights on the host, the copies of what adapters may change.
        """
        return {".".join(name): tensor for name, tensor in self._loaded().items()}

    @property
    def checksummed_tensors(self) -> dict[str, Tensor]:
        """Tensors that must keep their loaded bits, except while `is_modified`: base and live weights."""
        return self.base_tensors | {name: slot.parameter.data for name, slot in self._live.items()}

    def is_modified(self, name: str) -> bool:
        """Whether one of `checksummed_tensors` is a live weight that has adapters in it."""
        slot = self._live.get(name)
        return slot is not None and self._is_written(slot)

    def prepare(self, composition: AdapterSet) -> PreparedSwap:
        """Fuse a composition into buffers that are not bound, for `bind`; others may be bound meanwhile.

        An earlier preparation is written over. A failure is raised and leaves what is bound as it is. With the
        pristine weights on the host it only looks the layers up, and binding fuses.
        """
        self._version += 1
        key = adapter_set_key(composition)
        return PreparedSwap(key, self._version, self._fuser.prepare(key, *_columns(composition)))

    def bind(self, prepared: PreparedSwap) -> None:
        """Bind a prepared composition: an assignment per parameter, and no arithmetic.

        Raises:
            StalePreparation: something else was prepared or applied since; the bound weights stay.
        """
        if prepared.version != self._version:
            raise StalePreparation
        self._change(prepared.key, prepared.finish)

    def apply(self, composition: AdapterSet) -> None:
        """Bind the base with these adapters at these scales, in this order; an empty composition binds the base.

        Equals, to the last bit, a fresh base with the same adapters through `set_adapters` and `fuse_lora`. Where all
        sets of buffers are taken, one is written over, the one that is bound if there is no other. On any failure the
        base is bound and the failure is raised on.
        """
        key = adapter_set_key(composition)
        if key == self._applied:
            return
        self._version += 1
        self._change(key, lambda: self._fuser.apply(key, *_columns(composition)))

    def restore(self) -> None:
        """Bind the loaded tensors everywhere, or copy them back."""
        self._applied = _NONE
        self._fuser.restore()
        self._applied = ()

    def reserve(self, *, ahead: bool) -> None:
        """Take the memory of the fused buffers now: one set, or two where swaps are prepared ahead."""
        self._fuser.reserve(2 if ahead else 1)

    def drop_spare_buffers(self) -> None:
        """Give back the memory of buffers that are not bound; a prepared swap is lost."""
        self._version += 1
        self._fuser.drop_spares()

    def drop_spares(self) -> None:
        """Give back all memory that nothing bound needs: spare buffers and the adapters on the device."""
        self.drop_spare_buffers()
        if self._cache is not None:
            self._cache.clear()

    def checksum(self) -> str:
        """Return the sha256 of the loaded tensors, parameters and buffers, in hex, regardless of what is bound now.

        The same base gives the same value in any process: names, dtypes, shapes and bytes go in, by sorted name.
        """
        digest = hashlib.sha256()
        for name, tensor in sorted(self._loaded().items()):
            digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(bytes_of(tensor.detach().to("cpu").contiguous()))
        return digest.hexdigest()

    def _loaded(self) -> dict[ParameterName, Tensor]:
        return {name: slot.pristine for name, slot in self._slots.items()} | self._tensors

    def _change(self, key: AdapterSetKey, act: Callable[[], None]) -> None:
        self._applied = _NONE
        try:
            act()
        except BaseException:
            self.restore()
            raise
        self._applied = key


def adapter_set_key(composition: AdapterSet) -> AdapterSetKey:
    """Return what tells compositions apart: digests and scales, in order."""
    return tuple((adapter.digest, scale) for adapter, scale in composition)


def _columns(composition: AdapterSet) -> tuple[list[ParsedAdapter], list[Scale]]:
    return [adapter for adapter, _ in composition], [scale for _, scale in composition]
