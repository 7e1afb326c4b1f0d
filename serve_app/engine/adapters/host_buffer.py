"""Host memory for adapters: large buffers that are used again, because memory that was never touched is slow.

Owns the mappings that no adapter lies in any more. Thread-safe.
"""

from __future__ import annotations

import logging
import mmap
import weakref
from collections import deque

import numpy
import torch
from torch import Tensor

log = logging.getLogger(__name__)

# Below this size an ordinary allocation is as fast.
LARGE_BYTES = 4 * 1024**2
# Mappings come in sizes eight to an octave, so that adapters of about one size can follow one another.
STEPS_PER_OCTAVE = 8
# The most idle bytes: the room of an adapter or two that left, for the next that come.
MAX_IDLE_BYTES = 512 * 1024**2


class HostBuffers:
    """Large buffers; one that is dropped is kept for the next of about its size, up to `max_idle_bytes` in all.

    A first write to fresh memory costs a fault for every page, several times the copying itself. Huge pages, where
    the system has them, make that bearable; memory that is warm already makes it nothing.
    """

    def __init__(self, max_idle_bytes: int = MAX_IDLE_BYTES) -> None:
        self._max_idle_bytes = max_idle_bytes
        # Without a lock: a buffer may be dropped by the garbage collector in the middle of anything.
        self._idle: deque[mmap.mmap] = deque()

    @property
    def idle_bytes(self) -> int:
        """The bytes that are kept and not in use."""
        return sum(len(mapping) for mapping in tuple(self._idle))

    def take(self, size_bytes: int, *, pinned: bool = False) -> Tensor:
        """Return uninitialised bytes, page-locked where `pinned` and possible: those torch keeps for reuse itself."""
        if pinned and (locked := page_locked(size_bytes)) is not None:
            return locked
        if size_bytes < LARGE_BYTES:
            return torch.empty(size_bytes, dtype=torch.uint8)
        mapping_bytes = _rounded(size_bytes)
        mapping = self._reused(mapping_bytes) or _new_mapping(mapping_bytes)
        whole = numpy.frombuffer(mapping, numpy.uint8)
        # The tensor's storage holds this array for as long as any view of it lives.
        weakref.finalize(whole, self._give_back, mapping).atexit = False
        return torch.from_numpy(whole)[:size_bytes]

    def _reused(self, mapping_bytes: int) -> mmap.mmap | None:
        for _ in range(len(self._idle)):
            try:
                mapping = self._idle.popleft()
            except IndexError:  # another thread was faster
                return None
            if len(mapping) == mapping_bytes:
                return mapping
            self._idle.append(mapping)
        return None

    def _give_back(self, mapping: mmap.mmap) -> None:
        self._idle.append(mapping)
        while self.idle_bytes > self._max_idle_bytes:
            try:
                self._idle.popleft()  # the one idle for longest
            except IndexError:
                return


def page_locked(size_bytes: int) -> Tensor | None:
    """Return uninitialised page-locked bytes; None, with a warning, where the system has none to give."""
    try:
        return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        log.warning("%d bytes could not be page-locked, copies from them will be slow: %s", size_bytes, reason)
        return None


def book_page_locked_at_its_size() -> None:
    """Have torch take page-locked memory at the size asked for; by itself it rounds up to a power of two.

    To be called before any is taken.
    """
    torch._C._accelerator_setAllocatorSettings("pinned_max_round_threshold_mb:1")  # pyright: ignore[reportAttributeAccessIssue, reportPrivateUsage]


def _rounded(size_bytes: int) -> int:
    step = 1 << max(size_bytes.bit_length() - 1, 0)
    step //= STEPS_PER_OCTAVE
    return -(-size_bytes // step) * step


def _new_mapping(size_bytes: int) -> mmap.mmap:
    mapping = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping
