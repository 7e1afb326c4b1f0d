"""Pristine weights on the host: live ones are written where they lie, and are whole again whatever happened."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from serve_app.engine.adapters.deltas import Coverage, LowRank, ParsedAdapter
from serve_app.engine.weights.fused import FusedWeights
from serve_app.engine.weights.in_place import host_copies
from serve_app.engine.weights.integrity import IntegrityChecker
from tests.unit.engine.weights.test_fused_prepared import BROKEN, Live, adapter, composition

LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture
def live() -> Live:
    return Live(base_weights="host")


def addresses(live: Live) -> list[int]:
    return [parameter.data_ptr() for component in live.components.values() for parameter in component.parameters()]


def misshapen() -> ParsedAdapter:
    """An adapter whose factors do not fit each other, which fails in the arithmetic."""
    delta = LowRank(torch.ones(1, 32), torch.ones(32, 2), 1.0, 1.0)
    return ParsedAdapter("misshapen", {"unet": {LAYER: delta}}, Coverage(1, 1))


def test_no_parameter_ever_moves_and_the_device_holds_no_fused_buffers(live: Live) -> None:
    before = addresses(live)
    for names in (("everything", "text"), ("dora", "bias"), ()):
        live.apply(*names)
        assert live.holds(*names)
        assert addresses(live) == before
        assert live.weights.fused_buffer_bytes == 0


def test_a_dora_after_another_adapter_norms_the_loaded_weight(live: Live) -> None:
    live.apply("attention", "dora")
    assert live.holds("attention", "dora")


def test_a_failure_half_way_leaves_the_base_and_the_next_adapter_is_whole(live: Live) -> None:
    live.apply("attention")
    good = composition((("everything", 1.0),), torch.float32)
    with pytest.raises(RuntimeError):
        live.weights.apply([*good, (misshapen(), 1.0)])
    assert live.weights.applied == ()
    assert live.holds()
    live.apply("attention")
    assert live.holds("attention")


def test_what_was_prepared_is_what_binding_fuses(live: Live) -> None:
    live.apply("everything")
    prepared = live.prepare("text", "attention")
    assert live.holds("everything")
    live.weights.bind(prepared)
    assert live.holds("text", "attention")


def test_an_unknown_layer_is_found_before_anything_is_written(live: Live) -> None:
    with pytest.raises(KeyError):
        live.prepare("attention", BROKEN)
    assert live.holds()


def test_a_base_that_could_not_be_restored_is_not_taken_for_whole() -> None:
    module = Stubborn()
    weights = FusedWeights({"unet": module}, base_weights="host")
    pristine = module.conv.weight.clone()
    delta = LowRank(torch.ones(1, 4, 1, 1), torch.ones(4, 1, 1, 1), 1.0, 1.0)
    weights.apply([(ParsedAdapter("one", {"unet": {"conv": delta}}, Coverage(1, 1)), 1.0)])
    kept, module.conv.weight.data = module.conv.weight.data, torch.zeros(3, 3)  # nothing can be copied there
    with pytest.raises(RuntimeError):
        weights.apply([])
    module.conv.weight.data = kept
    assert not torch.equal(module.conv.weight, pristine)
    weights.apply([])
    assert torch.equal(module.conv.weight, pristine)


class Stubborn(nn.Module):
    """Three layers, and an embedding, which no adapter may change."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.conv = nn.Conv2d(4, 4, 1)
        self.norm = nn.LayerNorm(4)
        self.words = nn.Embedding(4, 4)


def test_a_layer_that_no_adapter_may_change_is_refused() -> None:
    weights = FusedWeights({"unet": Stubborn()}, base_weights="host")
    delta = LowRank(torch.ones(1, 4), torch.ones(4, 1), 1.0, 1.0)
    with pytest.raises(KeyError):
        weights.apply([(ParsedAdapter("one", {"unet": {"words": delta}}, Coverage(1, 1)), 1.0)])


def test_what_is_checked_is_what_was_loaded_whatever_is_fused(live: Live) -> None:
    check, checksum = IntegrityChecker(live.weights.base_tensors), live.weights.checksum()
    assert checksum == Live().weights.checksum()
    for names in (("everything",), ("text", "bias"), ()):
        live.apply(*names)
        assert check.check_all() is None
        assert live.weights.checksum() == checksum


@pytest.mark.parametrize("name", [f"unet.{LAYER}.weight", "unet.conv_norm_out.weight"])
def test_a_changed_bit_is_found_in_a_copy_and_in_what_has_none(live: Live, name: str) -> None:
    check = IntegrityChecker(live.weights.base_tensors)
    live.apply("everything")
    live.weights.base_tensors[name].view(torch.int32).view(-1)[0] ^= 1
    damage = check.check_all()
    assert damage is not None
    assert damage.tensor == name


def test_a_changed_bit_is_found_in_live_weights_that_hold_no_adapter(live: Live) -> None:
    check = IntegrityChecker(live.weights.checksummed_tensors, is_modified=live.weights.is_modified)
    live.apply("attention")
    assert check.check_all() is None
    at_rest = live.components["unet"].get_submodule("conv_in").weight
    at_rest.data.view(torch.int32).view(-1)[0] ^= 1
    damage = check.check_all()
    assert damage is not None
    assert damage.tensor == "live.unet.conv_in.weight"


def test_live_weights_are_watched_again_once_restored(live: Live) -> None:
    check = IntegrityChecker(live.weights.checksummed_tensors, is_modified=live.weights.is_modified)
    for names in (("everything", "text"), (), ("bias",), ()):
        live.apply(*names)
        assert check.check_all() is None
    live.components["unet"].get_submodule(LAYER).weight.data.view(torch.int32).view(-1)[0] ^= 1
    assert check.check_all() is not None


def test_fused_buffers_leave_nothing_to_watch_but_what_was_loaded() -> None:
    weights = Live().weights
    assert weights.checksummed_tensors.keys() == weights.base_tensors.keys()
    assert not any(weights.is_modified(name) for name in weights.checksummed_tensors)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(6, 5).t(),
        torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        torch.randn(7).bfloat16(),
        torch.randn(()),
        torch.randn(4, 6)[:, ::2],
    ],
    ids=["transposed", "channels last", "odd", "number", "gaps"],
)
def test_a_copy_has_the_values_and_the_dense_strides_of_what_it_copies(tensor: Tensor) -> None:
    (copy,) = host_copies([tensor])
    assert torch.equal(copy, tensor)
    assert copy.stride() == torch.empty_like(tensor).stride()
    assert copy.data_ptr() != tensor.data_ptr()


def test_copies_do_not_overlap() -> None:
    tensors = [torch.full((size,), float(size)) for size in (1, 3, 1000, 17)]
    assert all(torch.equal(copy, tensor) for copy, tensor in zip(host_copies(tensors), tensors, strict=True))


def test_what_is_fused_in_place_equals_what_is_fused_into_buffers_at_any_scale(live: Live) -> None:
    for scale in (0.0, -1.0, 2.5):
        live.weights.apply([(adapter("everything", torch.float32), scale)])
        other = Live()
        other.weights.apply([(adapter("everything", torch.float32), scale)])
        for component, module in live.components.items():
            pairs = zip(module.parameters(), other.components[component].parameters(), strict=True)
            assert all(torch.equal(mine, theirs) for mine, theirs in pairs)
