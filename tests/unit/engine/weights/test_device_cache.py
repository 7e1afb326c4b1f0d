"""Adapters on the device: the hottest stay, within a budget, and what is held is never dropped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from serve_app.engine.adapters.canonical import read_canonical, write_canonical
from serve_app.engine.adapters.deltas import Coverage, Dora, LowRank, ParsedAdapter, tensors_of
from serve_app.engine.weights.device_cache import DeviceCache, HeldAdapter, moved_to
from serve_app.engine.weights.side_stream import SideStream

HERE = torch.device("cpu")
META = torch.device("meta")


def adapter(name: str, width: int = 16) -> ParsedAdapter:
    plain = LowRank(torch.randn(1, width), torch.randn(width, 1), 1.0, 1.0)
    dora = Dora(LowRank(torch.randn(1, width), torch.randn(width, 1), 2.0, 1.0), torch.randn(width))
    return ParsedAdapter(name, {"unet": {"a": plain}, "text_encoder": {"b": dora}}, Coverage(2, 2))


class Moves:
    """Copies adapters, and remembers which."""

    def __init__(self) -> None:
        self.made: list[str] = []

    def __call__(self, one: ParsedAdapter, device: torch.device, copies: SideStream) -> HeldAdapter:
        """Copy an adapter within host memory."""
        self.made.append(one.digest)
        return moved_to(one, device, copies)


def use(cache: DeviceCache, *adapters: ParsedAdapter) -> None:
    with cache.holding(adapters):
        pass


def test_an_adapter_is_copied_once_and_found_again() -> None:
    moves, one = Moves(), adapter("one")
    cache = DeviceCache(10 * one.size_bytes, HERE, moves)
    with cache.holding([one]) as first, cache.holding([one]) as second:
        assert first[0] is second[0] is not one
    use(cache, one)
    assert (moves.made, cache.used_bytes) == (["one"], one.size_bytes)


def test_the_least_recently_used_goes_first() -> None:
    moves, adapters = Moves(), [adapter(name) for name in "abc"]
    cache = DeviceCache(2 * adapters[0].size_bytes, HERE, moves)
    use(cache, adapters[0])
    use(cache, adapters[1])
    use(cache, adapters[0])
    use(cache, adapters[2])
    assert cache.resident == ("a", "c")
    use(cache, adapters[1])
    assert moves.made == ["a", "b", "c", "b"]


def test_what_is_held_stays_though_the_budget_is_exceeded() -> None:
    adapters = [adapter(name) for name in "abc"]
    cache = DeviceCache(adapters[0].size_bytes, HERE)
    with cache.holding(adapters) as held:
        assert [one.whole.digest for one in held] == ["a", "b", "c"]
        assert cache.resident == ("a", "b", "c")
    assert cache.used_bytes <= adapters[0].size_bytes


def test_without_a_budget_nothing_stays() -> None:
    cache = DeviceCache(0, HERE)
    use(cache, adapter("one"))
    assert (cache.resident, cache.used_bytes) == ((), 0)


def test_a_copy_that_fails_leaves_no_trace() -> None:
    def fail(one: ParsedAdapter, device: torch.device, copies: SideStream) -> HeldAdapter:
        raise torch.OutOfMemoryError(one.digest)

    cache = DeviceCache(1 << 20, HERE, fail)
    with pytest.raises(torch.OutOfMemoryError):
        use(cache, adapter("one"))
    assert cache.resident == ()
    cache._move = moved_to
    use(cache, adapter("one"))
    assert cache.resident == ("one",)


def test_a_file_is_copied_to_one_buffer_and_equals_the_original(tmp_path: Path) -> None:
    write_canonical(adapter("one"), tmp_path / "one")
    original = read_canonical(tmp_path / "one")
    moved = moved_to(original, HERE, SideStream(HERE)).whole
    storages = {tensor.untyped_storage().data_ptr() for _, _, delta in moved.layers() for tensor in tensors_of(delta)}
    pairs = zip(original.layers(), moved.layers(), strict=True)
    assert len(storages) == 1
    for (component, module, before), (other_component, other_module, after) in pairs:
        assert (component, module, type(before)) == (other_component, other_module, type(after))
        for left, right in zip(tensors_of(before), tensors_of(after), strict=True):
            assert torch.equal(left, right)
            assert left.data_ptr() != right.data_ptr()


def test_tensors_of_different_buffers_are_copied_one_by_one() -> None:
    one = adapter("one")
    moved = moved_to(one, META, SideStream(META)).whole
    assert all(tensor.is_meta for _, _, delta in moved.layers() for tensor in tensors_of(delta))
    assert (moved.digest, moved.coverage, moved.size_bytes) == (one.digest, one.coverage, one.size_bytes)
