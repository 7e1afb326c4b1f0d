"""Exact application of adapters to a base's live weights.

Owns the binding of parameters: pristine tensor or fused twin. Must not know files, requests or which adapter comes
next. Used by one thread, the device thread.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from serve_app.engine.adapter import Delta, ParsedAdapter, bytes_of
from serve_app.engine.fuse import bias_of, fuse_bias, fuse_weight

Composition = Sequence[tuple[ParsedAdapter, float]]
CompositionKey = tuple[tuple[str, float], ...]
ParameterName = tuple[str, str]


class AdapterWeights:
    """The weights of a base's components, as loaded or with adapters fused in.

    Invariants: the tensors that were loaded are never written; what is bound depends on the composition alone, never
    on what was bound before; every parameter keeps its identity and needs no gradient; after a failure the base is
    bound. A fused twin exists only for parameters that some adapter touched, and is kept for the next one.
    Construct after the components are on their device and in their dtype.
    """

    def __init__(self, components: Mapping[str, nn.Module]) -> None:
        self._parameters: dict[ParameterName, nn.Parameter] = {}
        self._buffers: dict[ParameterName, Tensor] = {}
        for component, module in components.items():
            # matmul picks its kernel by requires_grad, so that a base's own bits would depend on its history.
            module.requires_grad_(False)
            self._parameters |= {(component, name): value for name, value in module.named_parameters()}
            self._buffers |= {(component, name): value for name, value in module.named_buffers()}
        self._pristine = {name: parameter.data for name, parameter in self._parameters.items()}
        self._twins: dict[ParameterName, Tensor] = {}
        self._bound: set[ParameterName] = set()
        self._applied: CompositionKey = ()

    @property
    def applied(self) -> CompositionKey:
        """What is bound: (digest, scale) of each adapter, in order; empty for the base."""
        return self._applied

    @property
    def twin_bytes(self) -> int:
        """The memory that fused twins take."""
        return sum(twin.nbytes for twin in self._twins.values())

    def apply(self, composition: Composition) -> None:
        """Bind the base with these adapters at these scales, in this order; an empty composition binds the base.

        Equals, to the last bit, a fresh base with the same adapters through `set_adapters` and `fuse_lora`.
        On any failure the base is bound and the failure is raised on.
        """
        key = composition_key(composition)
        if key == self._applied:
            return
        try:
            with torch.no_grad():
                touched = self._fuse(composition)
            for name in self._bound - touched:
                self._bind(name, self._pristine[name])
            for name in touched - self._bound:
                self._bind(name, self._twins[name])
        except BaseException:
            self.restore()
            raise
        self._bound, self._applied = touched, key

    def restore(self) -> None:
        """Bind the loaded tensors everywhere."""
        for name, parameter in self._parameters.items():
            if parameter.data_ptr() != self._pristine[name].data_ptr():
                self._bind(name, self._pristine[name])
        self._bound, self._applied = set(), ()

    def checksum(self) -> str:
        """Return the sha256 of the loaded tensors, parameters and buffers, whatever is bound now; hex.

        The same base gives the same value in any process: names, dtypes, shapes and bytes go in, by sorted name.
        """
        digest = hashlib.sha256()
        for name, tensor in sorted((self._pristine | self._buffers).items()):
            digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(bytes_of(tensor.detach().to("cpu").contiguous()))
        return digest.hexdigest()

    def _fuse(self, composition: Composition) -> set[ParameterName]:
        """Fill the twins of every touched parameter; return which were touched."""
        touched: set[ParameterName] = set()
        for adapter, scale in composition:
            for component, module, delta in adapter.layers():
                self._fuse_layer(component, module, delta, scale, touched)
        return touched

    def _fuse_layer(self, component: str, module: str, delta: Delta, scale: float, touched: set[ParameterName]) -> None:
        name = (component, f"{module}.weight")
        pristine, twin = self._pristine[name], self._twin(name)
        fuse_weight(twin, pristine, twin if name in touched else pristine, delta, scale)
        touched.add(name)
        if bias_of(delta) is not None:
            name = (component, f"{module}.bias")
            twin = self._twin(name)
            fuse_bias(twin, twin if name in touched else self._pristine[name], delta, scale)
            touched.add(name)

    def _twin(self, name: ParameterName) -> Tensor:
        twin = self._twins.get(name)
        if twin is None:
            twin = self._twins[name] = torch.empty_like(self._pristine[name])
        return twin

    def _bind(self, name: ParameterName, tensor: Tensor) -> None:
        self._parameters[name].data = tensor


def composition_key(composition: Composition) -> CompositionKey:
    """Return what tells compositions apart: digests and scales, in order."""
    return tuple((adapter.digest, scale) for adapter, scale in composition)
