"""A happens-before checker for two streams of a GPU, on a CPU.

Streams, events and the caching allocator's pool for each stream are imitated; the code under test is the real one.
Two accesses of one storage of which one writes must be ordered by program order in a stream, an event or a wait of the
host. Memory that is freed returns to the pool of the stream that it was taken on: whatever that stream does next must
come after every use on another stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

VIEWS = {
    "view", "as_strided", "set_", "detach", "unbind", "split", "transpose", "t", "permute", "expand", "squeeze",
    "unsqueeze", "alias", "select", "slice", "_unsafe_view", "flatten", "reshape",
}  # fmt: skip
Clock = dict[str, int]


def _merge(clock: Clock, other: Clock) -> None:
    for name, time in other.items():
        clock[name] = max(clock.get(name, 0), time)


class FakeStream:
    """A stream as far as its order goes: a vector clock."""

    device = "fake"

    def __init__(self, name: str) -> None:
        self.name = name
        self.clock: Clock = {}

    def record_event(self) -> Clock:
        """Return where the stream is."""
        return dict(self.clock)

    def wait_event(self, event: Clock) -> None:
        """Let later work start after the event."""
        _merge(self.clock, event)

    def wait_stream(self, other: FakeStream) -> None:
        """Let later work start after all that the other has."""
        _merge(self.clock, other.clock)


class _Storage:
    """What used a storage last, by stream: (time, operation)."""

    def __init__(self, storage: torch.UntypedStorage, stream: FakeStream) -> None:
        self.reference, self.stream = StorageWeakRef(storage), stream
        self.writes: dict[str, tuple[int, str]] = {}
        self.reads: dict[str, tuple[int, str]] = {}


class RaceChecker(TorchDispatchMode):
    """Watches every operation of torch; `races` says what was not ordered."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.side = FakeStream("main"), FakeStream("side")
        self.races: list[str] = []
        self._current = [self.main]
        self._host: Clock = {}
        self._storages: dict[int, _Storage] = {}
        self._freed: list[_Storage] = []

    @contextmanager
    def on(self, stream: FakeStream) -> Iterator[None]:
        """Stand in for `torch.cuda.stream`."""
        self._current.append(stream)
        try:
            yield
        finally:
            self._current.pop()

    def current_stream(self, device: object = None) -> FakeStream:
        """Stand in for `torch.cuda.current_stream`."""
        return self._current[-1]

    def wait_for(self, *streams: FakeStream) -> None:
        """Have the host wait until the streams are done."""
        for stream in streams:
            _merge(self._host, stream.clock)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        read: list[Tensor] = []
        written: list[Tensor] = []
        for argument, value in zip(func._schema.arguments, args, strict=False):
            (written if _is_written(argument) else read).extend(_tensors(value))
        for argument in func._schema.arguments:
            if argument.name in kwargs:
                (written if _is_written(argument) else read).extend(_tensors(kwargs[argument.name]))
        outcome = func(*args, **kwargs)
        if name not in VIEWS:
            self._find_freed()
            self._ran(name, read, [*written, *_tensors(outcome)])
        return outcome

    def _ran(self, name: str, read: list[Tensor], written: list[Tensor]) -> None:
        stream = self._current[-1]
        _merge(stream.clock, self._host)
        now = stream.clock[stream.name] = stream.clock.get(stream.name, 0) + 1
        for storage in [one for one in self._freed if one.stream is stream]:
            self._compare(f"{name} reuses memory of", stream, storage.writes, storage.reads)
            self._freed.remove(storage)
        for tensor in read:
            if storage := self._storage(tensor, stream):
                self._compare(f"{name} reads after", stream, storage.writes)
                storage.reads[stream.name] = now, name
        for tensor in written:
            if storage := self._storage(tensor, stream):
                self._compare(f"{name} writes after", stream, storage.writes, storage.reads)
                storage.writes[stream.name] = now, name

    def _compare(self, what: str, stream: FakeStream, *uses: dict[str, tuple[int, str]]) -> None:
        for use in uses:
            for other, (time, name) in use.items():
                if other != stream.name and stream.clock.get(other, 0) < time:
                    self.races.append(f"on {stream.name}, {what} {name} on {other}")

    def _storage(self, tensor: Tensor, stream: FakeStream) -> _Storage | None:
        storage = tensor.untyped_storage()
        if storage.nbytes() == 0:
            return None
        return self._storages.setdefault(storage._cdata, _Storage(storage, stream))

    def _find_freed(self) -> None:
        is_expired = torch.UntypedStorage._expired  # what `StorageWeakRef.expired` asks, three calls later
        found = [key for key, storage in self._storages.items() if is_expired(storage.reference.cdata)]
        self._freed += [self._storages.pop(key) for key in found]


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for one in value for tensor in _tensors(one)] if isinstance(value, (list, tuple)) else []
