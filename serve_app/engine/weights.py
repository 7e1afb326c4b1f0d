"""Exact application of adapters to a base's live weights.

Owns the binding of parameters: pristine tensor or fused twin. Must not know files, requests or which adapter comes
next. Used by one thread, the device thread; `prepare` alone may run in another while a pass runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from serve_app.core import Scale, scale_of
from serve_app.engine.adapter import ParsedAdapter, bytes_of
from serve_app.engine.device_cache import DeviceCache, moved_to
from serve_app.engine.fuse import Change, bias_of, fuse_bias, fuse_weights
from serve_app.engine.side_stream import SideStream

Composition = Sequence[tuple[ParsedAdapter, Scale]]
CompositionKey = tuple[tuple[str, Scale], ...]
ParameterName = tuple[str, str]


class StalePreparation(Exception):
    """What was prepared has been written over since, and must not be bound."""


@dataclass(slots=True, eq=False)
class _Site:
    """One parameter of the base: the tensor it was loaded with, and those that fused values go to."""

    parameter: nn.Parameter
    pristine: Tensor
    twins: list[Tensor] = field(default_factory=list)


class _Layer(NamedTuple):
    weight: _Site
    bias: _Site | None


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A composition fused and ready to be bound; good until the next one is prepared or applied.

    It refers to no adapter: what it was made of may go.
    """

    key: CompositionKey
    turn: int
    twins: Mapping[_Site, Tensor] = field(repr=False)


class AdapterWeights:
    """The weights of a base's components, as loaded or with adapters fused in.

    Invariants: the tensors that were loaded are never written; what is bound depends on the composition alone, never
    on what was bound before; every parameter keeps its identity and needs no gradient; `prepare` never writes what is
    bound; after a failure to apply, the base is bound. A fused twin exists only for parameters that some adapter
    touched, a second one only for those that were prepared while the first was bound; both are kept for the next.
    Construct after the components are on their device and in their dtype.
    """

    def __init__(self, components: Mapping[str, nn.Module], *, device_cache_bytes: int = 0) -> None:
        """Take over the components; `device_cache_bytes` of a GPU hold adapters that are used again and again."""
        self._sites: dict[ParameterName, _Site] = {}
        self._buffers: dict[ParameterName, Tensor] = {}
        for component, module in components.items():
            # matmul picks its kernel by requires_grad, so that a base's own bits would depend on its history.
            module.requires_grad_(False)
            parameters = module.named_parameters()
            self._sites |= {(component, name): _Site(parameter, parameter.data) for name, parameter in parameters}
            self._buffers |= {(component, name): value for name, value in module.named_buffers()}
        self._layers = _layers_of(self._sites)
        self._bound: Mapping[_Site, Tensor] = {}
        self._applied: CompositionKey = ()
        self._turn = 0
        device = next((site.pristine.device for site in self._sites.values()), torch.device("cpu"))
        self._side = SideStream(device)
        is_on_gpu = device.type == "cuda"
        self._cache = DeviceCache(device_cache_bytes, lambda adapter: moved_to(adapter, device)) if is_on_gpu else None

    @property
    def applied(self) -> CompositionKey:
        """What is bound: (digest, scale) of each adapter, in order; empty for the base."""
        return self._applied

    @property
    def twin_bytes(self) -> int:
        """The memory that fused twins take, bound or not."""
        return sum(twin.nbytes for site in self._sites.values() for twin in site.twins)

    @property
    def cached_bytes(self) -> int:
        """The memory that adapters on the device take."""
        return 0 if self._cache is None else self._cache.used_bytes

    @property
    def loaded(self) -> dict[str, Tensor]:
        """The loaded tensors, parameters and buffers, whatever is bound now, by component and name."""
        return {".".join(name): tensor for name, tensor in self._loaded().items()}

    def prepare(self, composition: Composition) -> Prepared:
        """Fuse a composition into twins that are not bound, whatever is bound meanwhile; for `bind`.

        Whatever was prepared before is written over. A failure is raised and leaves what is bound as it is.
        """
        return self._fuse(composition, overwrites_bound=False)

    def bind(self, prepared: Prepared) -> None:
        """Bind a prepared composition: an assignment per parameter, and no arithmetic.

        Raises:
            StalePreparation: something else was prepared or applied since; what is bound stays.
        """
        if prepared.turn != self._turn:
            raise StalePreparation
        self._side.join()
        try:
            for site in self._bound.keys() - prepared.twins.keys():
                site.parameter.data = site.pristine
            for site, twin in prepared.twins.items():
                site.parameter.data = twin
        except BaseException:
            self.restore()
            raise
        self._bound, self._applied = prepared.twins, prepared.key
        self._side.release()

    def apply(self, composition: Composition) -> None:
        """Bind the base with these adapters at these scales, in this order; an empty composition binds the base.

        Equals, to the last bit, a fresh base with the same adapters through `set_adapters` and `fuse_lora`. Takes no
        second twins: those that are bound are written over. On any failure the base is bound and the failure is
        raised on.
        """
        if composition_key(composition) == self._applied:
            return
        self._side.release()
        try:
            self.bind(self._fuse(composition, overwrites_bound=True))
        except BaseException:
            self.restore()
            raise

    def restore(self) -> None:
        """Bind the loaded tensors everywhere."""
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
            site.twins = [twin for twin in site.twins if twin is bound]

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

    def _fuse(self, composition: Composition, *, overwrites_bound: bool) -> Prepared:
        self._turn += 1
        twins: dict[_Site, Tensor] = {}
        adapters = [adapter for adapter, _ in composition]
        with torch.no_grad(), self._side.filling():
            if self._cache is None:
                self._fuse_all(adapters, composition, twins, overwrites_bound)
            else:
                with self._cache.holding(adapters) as residents:
                    self._fuse_all(residents, composition, twins, overwrites_bound)
        return Prepared(composition_key(composition), self._turn, twins)

    def _fuse_all(
        self,
        adapters: Sequence[ParsedAdapter],
        composition: Composition,
        twins: dict[_Site, Tensor],
        overwrites_bound: bool,
    ) -> None:
        for adapter, (_, scale) in zip(adapters, composition, strict=True):
            for component in adapter.components:
                self._fuse_component(adapter, component, scale_of(scale, component), twins, overwrites_bound)

    def _fuse_component(
        self,
        adapter: ParsedAdapter,
        component: str,
        scale: float,
        twins: dict[_Site, Tensor],
        overwrites_bound: bool,
    ) -> None:
        layers, changes = self._layers[component], []
        for module, delta in adapter.components[component].items():
            layer = layers[module]
            site = layer.weight
            current = twins.get(site, site.pristine)
            twin = twins[site] = self._spare(site, overwrites_bound) if current is site.pristine else current
            changes.append(Change(twin, site.pristine, current, delta, scale))
            if bias_of(delta) is not None:
                assert layer.bias is not None
                site = layer.bias
                current = twins.get(site, site.pristine)
                twin = twins[site] = self._spare(site, overwrites_bound) if current is site.pristine else current
                fuse_bias(twin, current, delta, scale)
        fuse_weights(changes)

    def _spare(self, site: _Site, overwrites_bound: bool) -> Tensor:
        """Return a twin to write: one that is not bound, else a new one, unless the bound one may go."""
        bound = self._bound.get(site)
        for twin in site.twins:
            if twin is not bound:
                return twin
        if bound is not None and overwrites_bound:
            return bound
        twin = torch.empty_like(site.pristine)
        site.twins.append(twin)
        return twin


def composition_key(composition: Composition) -> CompositionKey:
    """Return what tells compositions apart: digests and scales, in order."""
    return tuple((adapter.digest, scale) for adapter, scale in composition)


def _layers_of(sites: Mapping[ParameterName, _Site]) -> dict[str, dict[str, _Layer]]:
    """Return component -> module -> its weight and bias, for every module that has a weight."""
    layers: dict[str, dict[str, _Layer]] = {component: {} for component, _ in sites}
    for (component, name), site in sites.items():
        module = name.removesuffix(".weight")
        if module != name:
            layers[component][module] = _Layer(site, sites.get((component, f"{module}.bias")))
    return layers
