"""The hottest parsed adapters in a GPU's memory, under a byte budget.

Owns which adapters are there and the copy of one, piece by piece on a stream of its own, so that computing with the
first layers need not wait for the last. On a CPU there is nothing to copy, and `as_they_are` hands back what it is
given. Must not know weights or what an adapter is used for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields, replace
from functools import partial
from itertools import pairwise
from math import inf
from typing import Any

import torch
from torch import Tensor

from serve_app.engine.adapters.deltas import Direction, LowRankStack, ParsedAdapter, SingleLayer, StackedLayers
from serve_app.engine.adapters.stacks import stack_layers
from serve_app.engine.weights.side_stream import SideStream
from serve_app.store.budget import ByteBudget, EvictionPlan

# An adapter is copied in at most so many pieces: each costs the host two calls.
_MOST_PIECES = 8


class HeldAdapter:
    """An adapter where it is computed with; what is still on its way there is waited for when it is asked for.

    It is the current stream that waits, never the host.
    """

    def __init__(self, adapter: ParsedAdapter, arrivals: Sequence[tuple[int, Callable[[], None]]] = ()) -> None:
        """Take a copy, and what waits for its bytes up to some end, by growing ends."""
        self._adapter = adapter
        self._layers = stack_layers(adapter.components)
        self._arrivals = deque(arrivals)

    @property
    def stacks(self) -> Iterator[LowRankStack]:
        """The changes that are stacked, in the order in which they arrive."""
        for stack in self._layers.stacks:
            if self._arrivals:
                self._wait_until(_end_of(stack))
            yield stack

    @property
    def singles(self) -> Sequence[SingleLayer]:
        """All other changes."""
        self._wait_until()
        return self._layers.singles

    @property
    def whole(self) -> ParsedAdapter:
        """The adapter, all of which is there."""
        self._wait_until()
        return self._adapter

    def _wait_until(self, end: float = inf) -> None:
        arrived = 0
        while self._arrivals and arrived < end:
            arrived, wait = self._arrivals.popleft()
            wait()


HoldAdapters = Callable[[Sequence[ParsedAdapter]], AbstractContextManager[Sequence[HeldAdapter]]]


@contextmanager
def as_they_are(adapters: Sequence[ParsedAdapter]) -> Iterator[Sequence[HeldAdapter]]:
    """Give the adapters themselves, where host and device memory are one."""
    yield list(map(HeldAdapter, adapters))


class DeviceCache:
    """Copies of parsed adapters by digest, least recently used out first.

    Invariants: a held copy is never dropped. An adapter that the budget has no room for is copied all the same, and
    dropped once it is no longer held. Used by one thread at a time, and on a GPU on one stream alone, which has waited
    for every copy when none is held any more.
    """

    def __init__(self, budget_bytes: int, device: torch.device, move: MoveAdapter | None = None) -> None:
        self._budget = ByteBudget(budget_bytes)
        self._device, self._move = device, move or moved_to
        self._copies = SideStream(device)
        self._adapters: dict[str, HeldAdapter] = {}
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
    def holding(self, adapters: Sequence[ParsedAdapter]) -> Iterator[Sequence[HeldAdapter]]:
        """Give the adapters' copies on the device, copying those that are not there yet."""
        held: list[str] = []
        try:
            yield [self._hold(adapter, held) for adapter in adapters]
        finally:
            self._copies.wait_stream()
            for digest in held:
                self._drop(self._budget.unpin(digest))
            while self._unwanted:
                self._drop(self._budget.forget(self._unwanted.pop()))

    def _hold(self, adapter: ParsedAdapter, held: list[str]) -> HeldAdapter:
        self._budget.pin(adapter.digest)
        held.append(adapter.digest)
        resident = self._adapters.get(adapter.digest)
        if resident is None:
            resident = self._adapters[adapter.digest] = self._move(adapter, self._device, self._copies)
            self._drop(self._budget.add(adapter.digest, adapter.size_bytes))
        return resident

    def _drop(self, plan: EvictionPlan) -> None:
        for digest in plan.evict:
            del self._adapters[digest]


def moved_to(adapter: ParsedAdapter, device: torch.device, copies: SideStream) -> HeldAdapter:
    """Copy an adapter to a device, to memory of the current stream, and wait for none of it.

    As it comes from a canonical file, stacked and in one buffer, it goes in pieces, stack by stack.
    """
    layers = stack_layers(adapter.components)
    buffers = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in layers.tensors()}
    if len(buffers) != 1:
        copied = _mapped(layers, lambda tensor: tensor.to(device, non_blocking=True, copy=True))
        return HeldAdapter(replace(adapter, components=copied))
    (storage,) = buffers.values()
    source = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    target = torch.empty_like(source, device=device)
    copies.record_read_done()
    arrivals: list[tuple[int, Callable[[], None]]] = []
    with copies.stream_scope():
        for start, end in pairwise(_piece_ends(layers.stacks, len(source))):
            target[start:end].copy_(source[start:end], non_blocking=True)
            arrivals.append((end, partial(copies.wait_for, copies.mark())))
    moved = target.untyped_storage()

    def view(tensor: Tensor) -> Tensor:
        empty = torch.empty(0, dtype=tensor.dtype, device=device)
        return empty.set_(moved, tensor.storage_offset(), tensor.size(), tensor.stride())

    return HeldAdapter(replace(adapter, components=_mapped(layers, view)), arrivals)


MoveAdapter = Callable[[ParsedAdapter, torch.device, SideStream], HeldAdapter]


def _piece_ends(stacks: Iterable[LowRankStack], size: int) -> list[int]:
    """Return where pieces of the buffer end, 0 and the whole among them: where stacks do, and not too often."""
    ends = [0]
    for end in sorted(map(_end_of, stacks)):
        if end - ends[-1] >= size / _MOST_PIECES:
            ends.append(end)
    return [*ends, size] if ends[-1] < size else ends


def _end_of(stack: LowRankStack) -> int:
    """Return where a stack ends in its buffer, in bytes."""
    halves = stack.downs, stack.ups
    return max((int(rows.storage_offset()) + len(rows) * rows.stride(0)) * rows.itemsize for rows in halves)


def _mapped(layers: StackedLayers, change: Callable[[Tensor], Tensor]) -> StackedLayers:
    return layers.mapped(change, partial(_mapped_delta, change=change))


def _mapped_delta(delta: Any, change: Callable[[Tensor], Tensor]) -> Any:
    changes: dict[str, Any] = {}
    for part in fields(delta):
        value = getattr(delta, part.name)
        if isinstance(value, Tensor):
            changes[part.name] = change(value)
        elif isinstance(value, Direction):
            changes[part.name] = _mapped_delta(value, change)
    return replace(delta, **changes)
