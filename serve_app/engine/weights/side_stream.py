"""Work on a GPU beside another stream, and the waiting that keeps the two apart; nothing of it on a CPU.

Owns one CUDA stream and its order against the stream of the code that uses it: the device's own for fusing, that of
fusing for copies. Must not know weights or adapters.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class SideStream:
    """A second stream of a GPU; on a CPU every method does nothing.

    Invariants: work in `stream_scope` starts after all that the current stream had been given at the last
    `record_read_done`; work given to the current stream after `wait_stream` starts after that, and after `wait_for`
    after what was launched before the mark. Memory belongs to the stream on which it was allocated: it may be dropped
    only if it was used there alone, or after `wait_stream`.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._read_done: Any = None

    def record_read_done(self) -> None:
        """Let later work in `stream_scope` overwrite what the current stream has read."""
        if self._stream is not None:
            self._read_done = torch.cuda.current_stream(self._stream.device).record_event()

    @contextmanager
    def stream_scope(self) -> Iterator[None]:
        """Launch the work of the block on the side stream; for any thread, one at a time."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            if self._read_done is not None:
                self._stream.wait_event(self._read_done)
            yield

    def wait_stream(self) -> None:
        """Have the current stream wait for all that was launched in `stream_scope`."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    def mark(self) -> Any:
        """Return what `wait_for` takes: a mark of all that was launched so far."""
        return None if self._stream is None else self._stream.record_event()

    def wait_for(self, mark: Any) -> None:
        """Have the current stream wait for all that was launched before the mark."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(mark)
