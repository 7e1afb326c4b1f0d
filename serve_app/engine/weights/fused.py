"""Exact application of adapters to a base's live weights.

Owns the binding of parameters: pristine tensor or fused twin. Must not know files, requests or which adapter comes
next. Used by one thread, the device thread; `prepare` alone may run in another while a pass runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from serve_app.core import Scale, scale_of
from serve_app.engine.adapters.deltas import ParsedAdapter, bytes_of
from serve_app.engine.base.manifest import adaptable_layers
from serve_app.engine.weights.device_cache import DeviceCache, moved_to
from serve_app.engine.weights.fuse import LayerUpdate, changes_bias, fuse_bias, fuse_weights
from serve_app.engine.weights.in_place import InPlaceFuser
from serve_app.engine.weights.parameters import ParameterName, ParameterSlot, layers_among, layers_of
from serve_app.engine.weights.side_stream import SideStream

AdapterSet = Sequence[tuple[ParsedAdapter, Scale]]
AdapterSetKey = tuple[tuple[str, Scale], ...]
# What weights that are being written hold: no composition, so that whatever comes next is applied.
_NONE: AdapterSetKey = (("", 0.0),)


class StalePreparation(Exception):
    """What was prepared has been written over since, and must not be bound."""


@dataclass(frozen=True, slots=True, eq=False)
class PreparedSwap:
    """A composition fused and ready to be bound; good until the next one is prepared or applied.

    It refers to no adapter, and what it was made of may go; but where the pristine weights are on the host nothing can
    be fused beforehand, and it is no more than the composition.
    """

    key: AdapterSetKey
    turn: int
    fused_buffers: Mapping[ParameterSlot, Tensor] = field(repr=False)
    composition: AdapterSet = field(default=(), repr=False)


class FusedWeights:
    """The weights of a base's components, as loaded or with adapters fused in.

    Invariants: the tensors that were loaded are never written; what is bound depends on the composition alone, never
    on what was bound before; every parameter keeps its identity and needs no gradient; `prepare` never writes what is
    bound; after a failure to apply, the base is bound. A fused twin exists only for parameters that some adapter
    touched, a second one only for those that were prepared while the first was bound; both are kept for the next.
    With the pristine weights on the host there are no twins: live parameters are written where they lie, every layer
    that adapters may change has a copy on the host, and it is the copies that are never written.
    Construct after the components are on their device and in their dtype.
    """

    def __init__(
        self,
        components: Mapping[str, nn.Module],
        *,
        device_cache_bytes: int = 0,
        pristine_in: Literal["device", "host"] = "device",
    ) -> None:
        """Take over the components.

        Args:
            components: The modules whose weights adapters may change, by name.
            device_cache_bytes: What adapters that are used again and again may take of a GPU.
            pristine_in: "host" takes host memory for all layers that adapters may change, and none of the device.
        """
        self._sites: dict[ParameterName, ParameterSlot] = {}
        self._buffers: dict[ParameterName, Tensor] = {}
        for component, module in components.items():
            # matmul picks its kernel by requires_grad, so that a base's own bits would depend on its history.
            module.requires_grad_(False)
            parameters = module.named_parameters()
            self._sites |= {
                (component, name): ParameterSlot(parameter, parameter.data) for name, parameter in parameters
            }
            self._buffers |= {(component, name): value for name, value in module.named_buffers()}
        self._layers = layers_of(self._sites)
        self._in_place: InPlaceFuser | None = None
        if pristine_in == "host":
            names = {component: adaptable_layers(module) for component, module in components.items()}
            self._in_place = InPlaceFuser(layers_among(self._layers, names))
        in_place = frozenset[ParameterSlot]() if self._in_place is None else self._in_place.sites
        self._live = {".".join(("live", *name)): site for name, site in self._sites.items() if site in in_place}
        self._bound: Mapping[ParameterSlot, Tensor] = {}
        self._applied: AdapterSetKey = ()
        self._turn = 0
        device = next((site.parameter.device for site in self._sites.values()), torch.device("cpu"))
        self._side = SideStream(device)
        is_on_gpu = device.type == "cuda"
        self._cache = DeviceCache(device_cache_bytes, lambda adapter: moved_to(adapter, device)) if is_on_gpu else None

    @property
    def applied(self) -> AdapterSetKey:
        """What is bound: (digest, scale) of each adapter, in order; empty for the base."""
        return self._applied

    @property
    def twin_bytes(self) -> int:
        """The memory that fused twins take, bound or not."""
        return sum(fused_buffer.nbytes for site in self._sites.values() for fused_buffer in site.fused_buffers)

    @property
    def cached_bytes(self) -> int:
        """The memory that adapters on the device take."""
        return 0 if self._cache is None else self._cache.used_bytes

    @property
    def cached(self) -> tuple[str, ...]:
        """The digests of the adapters on the device, least recently used first; from any thread."""
        return () if self._cache is None else self._cache.resident

    def forget(self, digest: str) -> None:
        """Have an adapter's copy on the device dropped at the next swap; from any thread."""
        if self._cache is not None:
            self._cache.forget(digest)

    @property
    def loaded(self) -> dict[str, Tensor]:
        """The loaded tensors, parameters and buffers, whatever is bound now, by component and name.

        They are never written: with the pristine weights on the host, the copies of what adapters may change.
        """
        return {".".join(name): tensor for name, tensor in self._loaded().items()}

    @property
    def watched(self) -> dict[str, Tensor]:
        """What must have the bits that it was loaded with, but while `is_modified`: `loaded`, and the live weights."""
        return self.loaded | {name: site.parameter.data for name, site in self._live.items()}

    def is_modified(self, name: str) -> bool:
        """Whether one of `watched` is a live weight that has adapters in it."""
        site = self._live.get(name)
        return site is not None and self._in_place is not None and self._in_place.is_modified(site)

    def prepare(self, composition: AdapterSet) -> PreparedSwap:
        """Fuse a composition into twins that are not bound, whatever is bound meanwhile; for `bind`.

        Whatever was prepared before is written over. A failure is raised and leaves what is bound as it is. With the
        pristine weights on the host it only looks the layers up, and binding fuses.
        """
        if self._in_place is not None:
            self._turn += 1
            for adapter, _ in composition:
                self._in_place.check(adapter)
            return PreparedSwap(adapter_set_key(composition), self._turn, {}, tuple(composition))
        return self._fuse(composition, overwrites_bound=False)

    def bind(self, prepared: PreparedSwap) -> None:
        """Bind a prepared composition: an assignment per parameter, and no arithmetic.

        Raises:
            StalePreparation: something else was prepared or applied since; what is bound stays.
        """
        if prepared.turn != self._turn:
            raise StalePreparation
        if self._in_place is not None:
            self._write(self._in_place, prepared.composition)
            return
        self._side.join()
        try:
            for site in self._bound.keys() - prepared.fused_buffers.keys():
                site.parameter.data = site.pristine
            for site, fused_buffer in prepared.fused_buffers.items():
                site.parameter.data = fused_buffer
        except BaseException:
            self.restore()
            raise
        self._bound, self._applied = prepared.fused_buffers, prepared.key
        self._side.release()

    def apply(self, composition: AdapterSet) -> None:
        """Bind the base with these adapters at these scales, in this order; an empty composition binds the base.

        Equals, to the last bit, a fresh base with the same adapters through `set_adapters` and `fuse_lora`. Takes no
        second twins: those that are bound are written over. On any failure the base is bound and the failure is
        raised on.
        """
        if adapter_set_key(composition) == self._applied:
            return
        if self._in_place is not None:
            self._turn += 1
            self._write(self._in_place, composition)
            return
        self._side.release()
        try:
            self.bind(self._fuse(composition, overwrites_bound=True))
        except BaseException:
            self.restore()
            raise

    def restore(self) -> None:
        """Bind the loaded tensors everywhere, or copy them back."""
        if self._in_place is not None:
            self._applied = _NONE
            self._in_place.restore()
            self._applied = ()
            return
        self._side.join()
        for site in self._sites.values():
            if site.parameter.data_ptr() != site.pristine.data_ptr():
                site.parameter.data = site.pristine
        self._bound, self._applied = {}, ()
        self._side.release()

    def drop_spare_twins(self) -> None:
        """Give back the memory of twins that are not bound; whatever was prepared is lost."""
        self._turn += 1
        for site in self._sites.values():
            bound = self._bound.get(site)
            site.fused_buffers = [fused_buffer for fused_buffer in site.fused_buffers if fused_buffer is bound]

    def drop_spares(self) -> None:
        """Give back all memory that nothing bound needs: spare twins and the adapters on the device."""
        self.drop_spare_twins()
        if self._cache is not None:
            self._cache.clear()

    def checksum(self) -> str:
        """Return the sha256 of the loaded tensors, parameters and buffers, whatever is bound now; hex.

        The same base gives the same value in any process: names, dtypes, shapes and bytes go in, by sorted name.
        """
        digest = hashlib.sha256()
        for name, tensor in sorted(self._loaded().items()):
            digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(bytes_of(tensor.detach().to("cpu").contiguous()))
        return digest.hexdigest()

    def _loaded(self) -> dict[ParameterName, Tensor]:
        return {name: site.pristine for name, site in self._sites.items()} | self._buffers

    def _write(self, in_place: InPlaceFuser, composition: AdapterSet) -> None:
        """Fuse where the weights lie, on the device's own stream: after the pass before, and before the next."""
        adapters, scales = [adapter for adapter, _ in composition], [scale for _, scale in composition]
        self._applied = _NONE
        try:
            if self._cache is None:
                in_place.fuse(adapters, scales)
            else:
                with self._cache.holding(adapters) as residents:
                    in_place.fuse(residents, scales)
        except BaseException:
            self.restore()
            raise
        self._applied = adapter_set_key(composition)

    def _fuse(self, composition: AdapterSet, *, overwrites_bound: bool) -> PreparedSwap:
        self._turn += 1
        fused_buffers: dict[ParameterSlot, Tensor] = {}
        adapters = [adapter for adapter, _ in composition]
        with torch.no_grad(), self._side.filling():
            if self._cache is None:
                self._fuse_all(adapters, composition, fused_buffers, overwrites_bound)
            else:
                with self._cache.holding(adapters) as residents:
                    self._fuse_all(residents, composition, fused_buffers, overwrites_bound)
        return PreparedSwap(adapter_set_key(composition), self._turn, fused_buffers)

    def _fuse_all(
        self,
        adapters: Sequence[ParsedAdapter],
        composition: AdapterSet,
        fused_buffers: dict[ParameterSlot, Tensor],
        overwrites_bound: bool,
    ) -> None:
        for adapter, (_, scale) in zip(adapters, composition, strict=True):
            for component in adapter.components:
                self._fuse_component(adapter, component, scale_of(scale, component), fused_buffers, overwrites_bound)

    def _fuse_component(
        self,
        adapter: ParsedAdapter,
        component: str,
        scale: float,
        fused_buffers: dict[ParameterSlot, Tensor],
        overwrites_bound: bool,
    ) -> None:
        layers, changes = self._layers[component], []
        for module, delta in adapter.components[component].items():
            layer = layers[module]
            site = layer.weight
            current = fused_buffers.get(site, site.pristine)
            fused_buffer = fused_buffers[site] = (
                self._spare(site, overwrites_bound) if current is site.pristine else current
            )
            changes.append(LayerUpdate(fused_buffer, site.pristine, current, delta, scale))
            if changes_bias(delta):
                assert layer.bias is not None
                site = layer.bias
                current = fused_buffers.get(site, site.pristine)
                fused_buffer = fused_buffers[site] = (
                    self._spare(site, overwrites_bound) if current is site.pristine else current
                )
                fuse_bias(fused_buffer, current, delta, scale)
        fuse_weights(changes)

    def _spare(self, site: ParameterSlot, overwrites_bound: bool) -> Tensor:
        """Return a twin to write: one that is not bound, else a new one, unless the bound one may go."""
        bound = self._bound.get(site)
        for fused_buffer in site.fused_buffers:
            if fused_buffer is not bound:
                return fused_buffer
        if bound is not None and overwrites_bound:
            return bound
        fused_buffer = torch.empty_like(site.pristine)
        site.fused_buffers.append(fused_buffer)
        return fused_buffer


def adapter_set_key(composition: AdapterSet) -> AdapterSetKey:
    """Return what tells compositions apart: digests and scales, in order."""
    return tuple((adapter.digest, scale) for adapter, scale in composition)
