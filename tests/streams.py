"""A happens-before checker for the streams of a GPU, on a CPU.

Streams, events and the caching allocator's pool for each stream are imitated; the code under test is the real one.
Two accesses of the same bytes of which one writes must be ordered by program order in a stream, an event or a wait of
the host. Memory that is freed returns to the pool of the stream that it was taken on: whatever that stream does next
must come after every use on another stream.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

VIEWS = {
    "view", "as_strided", "set_", "detach", "unbind", "split", "transpose", "t", "permute", "expand", "squeeze",
    "unsqueeze", "alias", "select", "slice", "_unsafe_view", "flatten", "reshape",
}  # fmt: skip
Clock = dict[str, int]
Span = tuple[int, int]
# (stream, bytes): (time, operation)
Uses = dict[tuple[str, Span], tuple[int, str]]
ALL: Span = (0, sys.maxsize)


def _merge(clock: Clock, other: Clock) -> None:
    for name, time in other.items():
        if time > clock.get(name, 0):
            clock[name] = time


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
    """What used the bytes of a storage last."""

    def __init__(self, stream: FakeStream) -> None:
        self.stream = stream
        self.writes: Uses = {}
        self.reads: Uses = {}


class RaceChecker(TorchDispatchMode):
    """Watches every operation of torch; `races` says what was not ordered."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here: a wrapper that skips compiling would double the cost of watching."""
        return False

    def __init__(self) -> None:
        super().__init__()
        self.main, self.side, self.copies = map(FakeStream, ("main", "side", "copies"))
        self.races: list[str] = []
        self._current = [self.main]
        self._storages: dict[int, _Storage] = {}
        self._freed: dict[FakeStream, list[_Storage]] = {stream: [] for stream in (self.main, self.side, self.copies)}

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
        """Have the host wait until the streams are done: all that it launches later comes after that."""
        for stream in streams:
            for later in self._freed:
                _merge(later.clock, stream.clock)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        outcome = func(*args, **kwargs)
        name, written_at, written_names = _described(func)
        if name in VIEWS:
            return outcome
        read: list[Tensor] = []
        written: list[Tensor] = []
        for place, value in enumerate(args):
            _add_tensors(value, written if place in written_at else read)
        for key, value in kwargs.items():
            _add_tensors(value, written if key in written_names else read)
        _add_tensors(outcome, written)
        self._ran(name, read, written)
        return outcome

    def _ran(self, name: str, read: list[Tensor], written: list[Tensor]) -> None:
        stream = self._current[-1]
        now = stream.clock[stream.name] = stream.clock.get(stream.name, 0) + 1
        while freed := self._freed[stream]:
            storage = freed.pop()
            self._compare(name, "reuses memory of", stream, ALL, storage.writes, storage.reads)
        for tensor in read:
            if storage := self._storage(tensor, stream):
                span = _span(tensor)
                self._compare(name, "reads after", stream, span, storage.writes)
                storage.reads[stream.name, span] = now, name
        for tensor in written:
            if storage := self._storage(tensor, stream):
                span = _span(tensor)
                self._compare(name, "writes after", stream, span, storage.writes, storage.reads)
                storage.writes[stream.name, span] = now, name

    def _compare(self, name: str, what: str, stream: FakeStream, span: Span, *uses: Uses) -> None:
        for use in uses:
            for (other, (start, end)), (time, earlier) in use.items():
                is_ordered = other == stream.name or stream.clock.get(other, 0) >= time
                if not is_ordered and start < span[1] and span[0] < end:
                    self.races.append(f"on {stream.name}, {name} {what} {earlier} on {other}")

    def _storage(self, tensor: Tensor, stream: FakeStream) -> _Storage | None:
        storage = tensor.untyped_storage()
        found = self._storages.get(storage._cdata)
        if found is None and storage.nbytes():
            found = self._storages[storage._cdata] = _Storage(stream)
            # The object in Python lives as long as the memory, whatever refers to it.
            weakref.finalize(storage, self._free, storage._cdata).atexit = False
        return found

    def _free(self, key: int) -> None:
        storage = self._storages.pop(key)
        self._freed[storage.stream].append(storage)


def _span(tensor: Tensor) -> Span:
    """Return from where to where a tensor's bytes lie in its storage."""
    size, start = tensor.itemsize, int(tensor.storage_offset()) * tensor.itemsize
    if tensor.is_contiguous():
        return start, start + tensor.nbytes
    steps = ((count - 1) * int(stride) for count, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (sum(steps) + 1) * size


@cache
def _described(func: Any) -> tuple[str, frozenset[int], frozenset[str]]:
    """Return an operation's name, and which of its arguments it writes, by place and by name."""
    arguments = enumerate(func._schema.arguments)
    written = {place: one.name for place, one in arguments if one.alias_info is not None and one.alias_info.is_write}
    return func.overloadpacket.__name__, frozenset(written), frozenset(written.values())


def _add_tensors(value: Any, tensors: list[Tensor]) -> None:
    if isinstance(value, Tensor):
        tensors.append(value)
    elif isinstance(value, (list, tuple)):
        for one in value:
            _add_tensors(one, tensors)
