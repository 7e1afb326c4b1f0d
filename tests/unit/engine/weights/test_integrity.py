"""A changed bit is found, whichever it is; an untouched base never trips."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.engine.adapters.deltas import bytes_of
from serve_app.engine.weights.integrity import CorruptTensor, IntegrityChecker, ThrottledChecker, checksum


def tensors() -> dict[str, torch.Tensor]:
    """Tensors of every kind that a base has: odd sizes, other orders, other dtypes, views that start anywhere."""
    random = torch.Generator().manual_seed(0)
    buffer = torch.randn(1000, generator=random)
    return {
        "linear": torch.randn(33, 7, generator=random),
        "half": torch.randn(5, 3, generator=random).half(),
        "bfloat": torch.randn(129, generator=random).bfloat16(),
        "channels last": torch.randn(4, 3, 3, 3, generator=random).to(memory_format=torch.channels_last),
        "transposed": torch.randn(6, 10, generator=random).t(),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "odd start": buffer[3:160],
        "indices": torch.arange(77),
        "large": torch.randn(900, generator=random),
    }


def flip(tensor: torch.Tensor, bit: int) -> None:
    """Change one bit of a tensor's memory."""
    dense = tensor.permute(sorted(range(tensor.ndim), key=tensor.stride, reverse=True))
    view = bytes_of(dense)
    view[bit // 8 % len(view)] ^= 1 << bit % 8


@pytest.mark.parametrize("slice_bytes", [64, 1000, 1 << 20])
def test_any_flipped_bit_is_found_and_its_tensor_named(slice_bytes: int) -> None:
    kept = {name: tensor for name, tensor in tensors().items() if tensor.numel()}
    check = IntegrityChecker(kept, slice_bytes=slice_bytes)

    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @given(st.sampled_from(sorted(kept)), st.integers(0, 10**6))
    def found(name: str, bit: int) -> None:
        flip(kept[name], bit)
        assert check.check_all() == CorruptTensor(name)
        flip(kept[name], bit)
        assert check.check_all() is None

    found()


def test_exchanged_values_are_found() -> None:
    kept = {"weights": torch.arange(64, dtype=torch.int64)}
    check = IntegrityChecker(kept)
    kept["weights"][[3, 40]] = kept["weights"][[40, 3]]
    assert check.check_all() == CorruptTensor("weights")


def test_slice_by_slice_a_round_sees_everything() -> None:
    kept = tensors()
    check = IntegrityChecker(kept, slice_bytes=256)
    slices = 0
    while check.completed_rounds == 0:
        assert check.check_next() is None
        slices += 1
    assert slices > 5
    kept["large"][-1] += 1
    assert CorruptTensor("large") in [check.check_next() for _ in range(slices)]
    assert check.completed_rounds == 1


def test_the_fingerprint_is_the_same_as_computed_on_a_gpu() -> None:
    words = torch.randint(-(2**63), 2**63 - 1, (1001,), dtype=torch.int64)
    weights = torch.arange(1, 2003, 2)
    expected = sum(word * weight for word, weight in zip(words.tolist(), weights.tolist(), strict=True)) % 2**64
    assert checksum(words, weights).item() % 2**64 == expected
    assert (words * weights).sum().item() % 2**64 == expected


def test_nothing_to_check_is_sound() -> None:
    check = IntegrityChecker({})
    assert check.check_next() is None
    assert check.check_all() is None


class Clock:
    """A clock on which every look takes two milliseconds."""

    def __init__(self) -> None:
        self._now = 0.0

    def __call__(self) -> float:
        """Return seconds."""
        self._now += 0.002
        return self._now


def test_checking_takes_a_twentieth_of_idle_time_and_rests_after_a_round() -> None:
    check = ThrottledChecker(IntegrityChecker(tensors(), slice_bytes=256), rest_s=30.0, clock=Clock())
    pauses = []
    while check.completed_rounds == 0:
        check.check_next()
        pauses.append(check.pause_s)
    assert pauses[:-1] == pytest.approx([0.04] * (len(pauses) - 1))
    assert pauses[-1] == 30.0
