"""The hottest parsed adapters in a GPU's memory, under a byte budget.

Owns which adapters are there and the copy of one. On a CPU there is nothing to copy, and `inert` hands back what it
is given. Must not know weights or what an adapter is used for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from serve_app.engine.adapters.deltas import Delta, Direction, ParsedAdapter, StackedLayers
from serve_app.store.budget import ByteBudget, EvictionPlan

HoldAdapters = Callable[[Sequence[ParsedAdapter]], AbstractContextManager[Sequence[ParsedAdapter]]]


@contextmanager
def as_they_are(adapters: Sequence[ParsedAdapter]) -> Iterator[Sequence[ParsedAdapter]]:
    """Give the adapters themselves, where host and device memory are one."""
    yield adapters


class DeviceCache:
    """Copies of parsed adapters by digest, least recently used out first.

    Invariants: a held copy is never dropped. An adapter that the budget has no room for is copied all the same, and
    dropped once it is no longer held. Used by one thread at a time, and on a GPU on one stream alone.
    """

    def __init__(self, budget_bytes: int, move: Callable[[ParsedAdapter], ParsedAdapter]) -> None:
        self._budget = ByteBudget(budget_bytes)
        self._move = move
        self._adapters: dict[str, ParsedAdapter] = {}
        self._unwanted: set[str] = set()

    @property
    def used_bytes(self) -> int:
        """The bytes of the copies."""
        return self._budget.used_bytes

    @property
    def resident(self) -> tuple[str, ...]:
        """The digests of the adapters that are there, least recently used first."""
        return self._budget.keys

    def forget(self, digest: str) -> None:
        """Have a copy dropped when copies are held next; from any thread."""
        self._unwanted.add(digest)

    def clear(self) -> None:
        """Drop every copy that is not held."""
        for digest in self._budget.keys:
            self._drop(self._budget.forget(digest))

    @contextmanager
    def holding(self, adapters: Sequence[ParsedAdapter]) -> Iterator[Sequence[ParsedAdapter]]:
        """Give the adapters' copies on the device, copying those that are not there yet."""
        held: list[str] = []
        try:
            yield [self._hold(adapter, held) for adapter in adapters]
        finally:
            for digest in held:
                self._drop(self._budget.unpin(digest))
            while self._unwanted:
                self._drop(self._budget.forget(self._unwanted.pop()))

    def _hold(self, adapter: ParsedAdapter, held: list[str]) -> ParsedAdapter:
        self._budget.pin(adapter.digest)
        held.append(adapter.digest)
        resident = self._adapters.get(adapter.digest)
        if resident is None:
            resident = self._adapters[adapter.digest] = self._move(adapter)
            self._drop(self._budget.add(adapter.digest, adapter.size_bytes))
        return resident

    def _drop(self, plan: EvictionPlan) -> None:
        for digest in plan.evict:
            del self._adapters[digest]


def moved_to(adapter: ParsedAdapter, device: torch.device) -> ParsedAdapter:
    """Copy an adapter to a device without waiting for the copy: in one piece where its tensors share one buffer."""
    tensors = list(adapter.tensors())
    buffers = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    if len(buffers) > 1 or not tensors:
        return _mapped(adapter, lambda tensor: tensor.to(device, non_blocking=True, copy=True))
    (storage,) = buffers.values()
    whole = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    moved = whole.to(device, non_blocking=True, copy=True).untyped_storage()

    def view(tensor: Tensor) -> Tensor:
        empty = torch.empty(0, dtype=tensor.dtype, device=device)
        return empty.set_(moved, tensor.storage_offset(), tensor.size(), tensor.stride())

    return _mapped(adapter, view)


def _mapped(adapter: ParsedAdapter, change: Callable[[Tensor], Tensor]) -> ParsedAdapter:
    def changed(delta: Delta) -> Delta:
        return _mapped_delta(delta, change)

    if isinstance(adapter.components, StackedLayers):
        return replace(adapter, components=adapter.components.mapped(change, changed))
    components = {
        component: {module: changed(delta) for module, delta in modules.items()}
        for component, modules in adapter.components.items()
    }
    return replace(adapter, components=components)


def _mapped_delta(delta: Any, change: Callable[[Tensor], Tensor]) -> Any:
    changes: dict[str, Any] = {}
    for part in fields(delta):
        value = getattr(delta, part.name)
        if isinstance(value, Tensor):
            changes[part.name] = change(value)
        elif isinstance(value, Direction):
            changes[part.name] = _mapped_delta(value, change)
    return replace(delta, **changes)
