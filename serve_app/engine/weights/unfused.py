"""Adapters beside layers whose weights are quantised: each adds its low-rank product to what the layer computes.

Owns which layers have such branches. Fusing would round the sum to the few values that packed weights can have.
Operations, their order and dtypes are those of the `forward` of peft's layers, so that images equal diffusers' with the
same adapters loaded and not fused, to the last bit. Must not know files, requests or which adapter comes next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from serve_app.core import AdapterSetKey, Scale, scale_of
from serve_app.engine.adapters.deltas import Delta, LowRank, ParsedAdapter
from serve_app.engine.base.manifest import adaptable_layers
from serve_app.engine.weights.device_cache import HoldAdapters

Branch = tuple[LowRank, float]


class UnfusedAdapters:
    """The branches of one composition, on the layers that it changes.

    Invariants: no weight is ever written, so that a change of adapters can harm none; the branches are those of one
    whole composition. What is bound is held on the device. Used by one thread, on one stream: there is nothing to
    compute ahead.
    """

    fused_bytes = 0
    kept = frozenset[AdapterSetKey]()

    def __init__(self, components: Mapping[str, nn.Module], hold: HoldAdapters) -> None:
        self._layers = {component: adaptable_layers(module) for component, module in components.items()}
        self._hold = hold
        self._bound = ExitStack()
        self._hooks: list[RemovableHandle] = []

    def prepare(
        self, key: AdapterSetKey, adapters: Sequence[ParsedAdapter], scales: Sequence[Scale]
    ) -> Callable[[], None]:
        """Do nothing; returns what binds the branches."""
        return partial(self.apply, key, adapters, scales)

    def apply(self, key: AdapterSetKey, adapters: Sequence[ParsedAdapter], scales: Sequence[Scale]) -> None:
        """Bind the branches of these adapters, in this order; a failure leaves what was bound.

        Raises:
            KeyError: there is no such layer.
        """
        with ExitStack() as held:
            branches: dict[nn.Module, list[Branch]] = {}
            residents = held.enter_context(self._hold(adapters))
            for adapter, scale in zip(residents, scales, strict=True):
                for component, module, delta in adapter.whole.layers():
                    branch = _branch(delta, scale_of(scale, component))
                    branches.setdefault(self._layers[component][module], []).append(branch)
            self.restore()
            self._hooks = [layer.register_forward_hook(partial(_add, own)) for layer, own in branches.items()]
            self._bound = held.pop_all()

    def restore(self) -> None:
        """Take all branches away."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._bound.close()

    def reserve(self, sets: int) -> None:
        """Do nothing: there are no buffers."""

    def drop_spares(self) -> None:
        """Do nothing: there are no buffers."""


def _branch(delta: Delta, scale: float) -> Branch:
    assert isinstance(delta, LowRank)
    assert delta.shift is None
    # As peft's own factors, which it leaves so: torch's matmul picks its kernel by whether one may need a gradient.
    down, up = (factor.detach().requires_grad_() for factor in (delta.down, delta.up))
    return replace(delta, down=down, up=up), delta.factor(scale)


def _add(branches: Sequence[Branch], layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Return the output of a layer with its branches added; a forward hook."""
    values, dtype = inputs[0], output.dtype
    for delta, factor in branches:
        values = values.to(delta.down.dtype)
        if delta.down.ndim == 2:
            product = F.linear(F.linear(values, delta.down), delta.up, delta.bias)
        else:
            # The layer's own stride and padding; the widening half is one pixel wide.
            product = F.conv2d(layer._conv_forward(values, delta.down, None), delta.up, delta.bias)
        output = output + product * factor
    return output.to(dtype)
