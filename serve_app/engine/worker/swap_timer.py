"""How long changes of adapters take: by the host's clock, and on a GPU by events of the device's stream.

Owns the events that the device has not reached yet. Never waits for the device: a change is told of once it is over.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

Named = TypeVar("Named")


@dataclass(frozen=True, slots=True)
class TimedSwap(Generic[Named]):
    """A change of adapters that is over, and whose it was."""

    owner: Named
    seconds: float
    was_kept: bool


class SwapTimer(Generic[Named]):
    """Times one change at a time; on a CPU a change is over when its calls are."""

    def __init__(self, clock: Callable[[], float], record: Callable[[], Any] | None) -> None:
        """`record` puts a timing event into the device's stream; None where the host does the work."""
        self._clock, self._record = clock, record
        self._began_s, self._began = 0.0, None
        self._pending: deque[tuple[Named, float, bool, Any, Any]] = deque()

    def begin(self) -> None:
        """Note that a change begins."""
        self._began_s, self._began = self._clock(), self._record and self._record()

    def end(self, owner: Named, *, was_kept: bool) -> None:
        """Note that all calls of the change were made; `was_kept` says that nothing had to be computed for it."""
        host_s, ended = self._clock() - self._began_s, self._record and self._record()
        self._pending.append((owner, host_s, was_kept, self._began, ended))

    def finished(self) -> Iterator[TimedSwap[Named]]:
        """Yield the changes that the device is through with, each once, in their order."""
        while self._pending and (self._pending[0][4] is None or self._pending[0][4].query()):
            owner, host_s, was_kept, began, ended = self._pending.popleft()
            seconds = host_s if began is None else max(began.elapsed_time(ended) / 1e3, host_s)
            yield TimedSwap(owner, seconds, was_kept)


def recorder_of(device: torch.device) -> Callable[[], Any] | None:
    """Return what puts a timing event into the current stream of a GPU; None for another device."""
    if device.type != "cuda":
        return None

    def record() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event

    return record
