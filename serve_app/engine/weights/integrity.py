"""Checksums of a base's loaded tensors, computed once and compared later.

Owns the arithmetic and the place in the round. Must not know who asks or when: a slice takes about a millisecond, so
that it fits between two requests. Checksums are computed where the tensors lie.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

# One slice: about half a millisecond of a CPU's memory, and less of a GPU's.
_SLICE_BYTES = {"cpu": 4 << 20, "cuda": 16 << 20}
_WORD_BYTES = 8
# The share of an idle device's time that checking takes.
_SHARE = 0.05
_SHORTEST_PAUSE_S = 0.01


@dataclass(frozen=True, slots=True)
class CorruptTensor:
    """A tensor that is no longer what was loaded."""

    tensor: str


@dataclass(frozen=True, slots=True, eq=False)
class _Slice:
    names: tuple[str, ...]
    parts: tuple[Tensor, ...]
    checksums: tuple[int, ...]


class IntegrityChecker:
    """Whether tensors still have the bits that they had at construction.

    A checksum is the sum of a part's 64-bit words, each multiplied by an odd weight of its place, modulo 2**64:
    any change of one word changes it. The tensors must not be moved, nor written but where it is told.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        *,
        slice_bytes: int | None = None,
        is_modified: Callable[[str], bool] = lambda name: False,
    ) -> None:
        """Take the checksums; reads every byte once.

        A tensor for which `is_modified` holds when it is looked at may have other bits for now.
        """
        self._is_written = is_modified
        self._weights: dict[torch.device, Tensor] = {}
        slices: list[_Slice] = []
        for device in dict.fromkeys(tensor.device for tensor in tensors.values()):
            size = slice_bytes or _SLICE_BYTES.get(device.type, 4 << 20)
            count = max(size // _WORD_BYTES, 1)
            self._weights[device] = torch.arange(1, 2 * count, 2, dtype=torch.int64, device=device)
            cut = _cut({name: one for name, one in tensors.items() if one.device == device}, size)
            # One thread reads slower than a CPU's memory gives. Weights that are mapped get their pages here.
            with ThreadPoolExecutor(torch.get_num_threads() if device.type == "cpu" else 1) as readers:
                slices += readers.map(self._take, cut)
        self._slices = tuple(slices)
        self._next = 0
        self.completed_rounds = 0

    def check_next(self) -> CorruptTensor | None:
        """Check one slice; the round begins again after the last, and is counted if it found nothing."""
        if not self._slices:
            return None
        damage = self._check(self._slices[self._next])
        self._next = (self._next + 1) % len(self._slices)
        if self._next == 0 and damage is None:
            self.completed_rounds += 1
        return damage

    def check_all(self) -> CorruptTensor | None:
        """Check everything, from the first slice on."""
        self._next = 0
        for one in self._slices:
            if damage := self._check(one):
                return damage
        self.completed_rounds += 1
        return None

    def _check(self, one: _Slice) -> CorruptTensor | None:
        found = self._checksums(one.parts)
        pairs = zip(one.names, found, one.checksums, strict=True)
        return next(
            (CorruptTensor(name) for name, now, then in pairs if now != then and not self._is_written(name)), None
        )

    def _take(self, pending: Sequence[tuple[str, Tensor]]) -> _Slice:
        parts = tuple(part for _, part in pending)
        return _Slice(tuple(name for name, _ in pending), parts, self._checksums(parts))

    def _checksums(self, parts: tuple[Tensor, ...]) -> tuple[int, ...]:
        weights = self._weights[parts[0].device]
        with torch.no_grad():
            sums = [checksum(part, weights[: part.numel()]) for part in parts]
            return tuple(torch.stack(sums).tolist())


class ThrottledChecker:
    """A self-check that leaves the device alone most of the time.

    Between two slices it rests for so long that checking takes a small share of the time, and longer after each
    round. The clock gives seconds that only grow.
    """

    def __init__(
        self, check: IntegrityChecker, *, rest_s: float = 60.0, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._check = check
        self._rest_s = rest_s
        self._clock = clock
        self.pause_s = _SHORTEST_PAUSE_S
        """How long to wait, if nothing else is to be done, before `check_next`."""

    @property
    def completed_rounds(self) -> int:
        """How many times everything was checked and sound."""
        return self._check.completed_rounds

    def check_next(self) -> CorruptTensor | None:
        """Check one slice."""
        started, completed_rounds = self._clock(), self.completed_rounds
        damage = self._check.check_next()
        paused = max((self._clock() - started) / _SHARE, _SHORTEST_PAUSE_S)
        self.pause_s = paused if self.completed_rounds == completed_rounds else max(paused, self._rest_s)
        return damage

    def check_all(self) -> CorruptTensor | None:
        """Check everything now."""
        return self._check.check_all()


def checksum(words: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted sum of integers modulo 2**64, as a tensor without dimensions; both are [n]."""
    words = words.to(torch.int64)
    # CUDA has no dot product of integers; a CPU's needs no intermediate.
    return torch.dot(words, weights) if words.device.type == "cpu" else (words * weights).sum()


def _cut(tensors: Mapping[str, Tensor], size: int) -> Iterator[Sequence[tuple[str, Tensor]]]:
    """Yield slices of about `size` bytes: many small tensors of one device, or a part of a large one."""
    pending: list[tuple[str, Tensor]] = []
    filled = 0
    for name, tensor in tensors.items():
        for part in _parts_of(tensor, size):
            if filled and filled + part.nbytes > size:
                yield pending
                pending, filled = [], 0
            pending.append((name, part))
            filled += part.nbytes
    if pending:
        yield pending


def _parts_of(tensor: Tensor, size: int) -> Iterator[Tensor]:
    """Yield all bytes of a tensor as views: of 64-bit words as far as they go, then of single bytes."""
    tensor = tensor.detach()
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    flat = tensor.permute(order)  # channels-last and transposed weights lie dense in another order
    if not flat.is_contiguous() or flat.numel() == 0:
        flat = tensor.contiguous()
    data = flat.reshape(-1).view(torch.uint8)
    is_aligned = data.data_ptr() % _WORD_BYTES == data.storage_offset() % _WORD_BYTES == 0
    words = data.numel() // _WORD_BYTES * _WORD_BYTES if is_aligned else 0
    step = max(size // _WORD_BYTES, 1) * _WORD_BYTES
    for start in range(0, words, step):
        yield data[start : min(start + step, words)].view(torch.int64)
    for start in range(words, data.numel(), step // _WORD_BYTES):
        yield data[start : start + step // _WORD_BYTES]
