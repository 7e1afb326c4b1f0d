"""Compositions prepared beforehand: fused beside what is bound, bound by assignment, exact whatever came between."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from serve_app.engine.adapters.deltas import Coverage, LowRank, ParsedAdapter
from serve_app.engine.base.manifest import adaptable_components
from serve_app.engine.weights.fused import FusedWeights, PreparedSwap, StalePreparation
from tests.tiny import tiny_pipeline
from tests.tiny_compositions import BROKEN, Members, adapter, composition, digest_of, freshly_bound

KINDS = ("attention", "everything", "text", "dora", "bias")
MEMBER = st.tuples(st.sampled_from([*KINDS, BROKEN]), st.sampled_from((0.3, -1.0, 1.0)))
MEMBERS = st.lists(MEMBER, max_size=2, unique_by=lambda member: member[0]).map(tuple)
EVENTS = st.one_of(
    st.tuples(st.just("prepare"), MEMBERS),
    st.tuples(st.just("apply"), MEMBERS),
    st.tuples(st.sampled_from(["bind", "bind", "restore", "drop"]), st.just(())),
)


class Live:
    """A tiny base and its weights."""

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        *,
        base_weights: Literal["device", "host"] = "device",
        fused_sets: int = 1,
    ) -> None:
        self.components = adaptable_components(tiny_pipeline("sd15", dtype))
        self.weights = FusedWeights(self.components, base_weights=base_weights, fused_sets=fused_sets)

    def prepare(self, *names: str) -> PreparedSwap:
        return self.weights.prepare(composition(tuple((name, 1.0) for name in names), torch.float32))

    def apply(self, *names: str) -> None:
        self.weights.apply(composition(tuple((name, 1.0) for name in names), torch.float32))

    def holds(self, *names: str) -> bool:
        return digest_of(self.components) == freshly_bound(tuple((name, 1.0) for name in names), torch.float32)


@dataclass
class Expected:
    """What should be bound, and what may be; a plain account of the rules, kept beside the weights."""

    bound: Members = ()
    prepared: Members | None = None
    handle: PreparedSwap | None = None

    def play(self, weights: FusedWeights, event: str, members: Members, dtype: torch.dtype) -> None:
        """Carry an event out, and note what it should do."""
        is_broken = any(name == BROKEN for name, _ in members)
        match event:
            case "prepare" if is_broken:
                self.prepared = None
                with pytest.raises(KeyError):
                    weights.prepare(composition(members, dtype))
            case "prepare":
                self.handle, self.prepared = weights.prepare(composition(members, dtype)), members
            case "apply" if is_broken:
                self.bound, self.prepared = (), None
                with pytest.raises(KeyError):
                    weights.apply(composition(members, dtype))
            case "apply":
                self.prepared = self.prepared if members == self.bound else None
                self.bound = members
                weights.apply(composition(members, dtype))
            case "bind" if self.prepared is not None:
                assert self.handle is not None
                self.bound = self.prepared
                weights.bind(self.handle)
            case "bind" if self.handle is not None:
                with pytest.raises(StalePreparation):
                    weights.bind(self.handle)
            case "restore":
                self.bound = ()
                weights.restore()
            case "drop":
                self.prepared = None
                weights.drop_spare_buffers()
            case _:
                pass


@pytest.mark.parametrize(("base_weights", "fused_sets"), [("device", 1), ("device", 3), ("host", 1)])
@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in (torch.float32, torch.float16))],
    ids=str,
)
def test_any_history_of_preparing_and_applying_leaves_what_a_fresh_base_would_have(
    dtype: torch.dtype, base_weights: Literal["device", "host"], fused_sets: int
) -> None:
    live, expected = Live(dtype, base_weights=base_weights, fused_sets=fused_sets), Expected()
    pristine = live.weights.checksum()

    @settings(max_examples=15, deadline=None, derandomize=True, database=None)
    @given(st.lists(EVENTS, min_size=1, max_size=12))
    def check(history: list[tuple[str, Members]]) -> None:
        for event, members in history:
            expected.play(live.weights, event, members, dtype)
            assert digest_of(live.components) == freshly_bound(expected.bound, dtype)

    check()  # one live base sees every history, one after another
    assert live.weights.checksum() == pristine
    live.weights.restore()
    assert digest_of(live.components) == freshly_bound((), dtype)


def test_preparing_leaves_what_is_bound_as_it_is() -> None:
    live = Live()
    live.apply("attention")
    live.prepare("everything")
    assert live.holds("attention")
    assert live.weights.applied == ((adapter("attention", torch.float32).digest, 1.0),)


class _NoArithmetic(TorchDispatchMode):
    """Lets tensors be looked at and bound, not computed with."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ in {"detach", "set_"}
        return func(*args, **(kwargs or {}))


def test_binding_what_was_prepared_fuses_nothing() -> None:
    live = Live()
    live.apply("everything")
    prepared = live.prepare("attention")
    with _NoArithmetic():
        live.weights.bind(prepared)
    assert live.holds("attention")


def test_what_was_prepared_may_be_bound_again_after_the_base() -> None:
    live = Live()
    prepared = live.prepare("text", "attention")
    for _ in range(2):
        live.weights.bind(prepared)
        assert live.holds("text", "attention")
        live.weights.restore()
        assert live.holds()


def test_a_preparation_that_fails_leaves_what_is_bound() -> None:
    live = Live()
    live.apply("everything")
    with pytest.raises(KeyError):
        live.prepare("attention", BROKEN)
    assert live.holds("everything")


def test_what_was_prepared_is_void_once_something_else_was_fused() -> None:
    live = Live()
    prepared = live.prepare("attention")
    live.apply("text")
    with pytest.raises(StalePreparation):
        live.weights.bind(prepared)
    assert live.holds("text")


def test_applying_takes_one_buffer_for_a_layer_and_preparing_a_second_only_where_the_first_is_bound() -> None:
    live = Live()
    live.apply("attention")
    one = live.weights.fused_buffer_bytes
    live.apply("dora")
    assert live.weights.fused_buffer_bytes == one  # the same layers: written over in place
    for name in ("attention", "dora", "attention"):
        live.weights.bind(live.prepare(name))
        assert live.weights.fused_buffer_bytes == 2 * one
    live.weights.drop_spare_buffers()
    assert live.weights.fused_buffer_bytes == one
    assert live.holds("attention")


def test_preparing_over_the_base_takes_no_second_buffers() -> None:
    live = Live()
    live.apply("attention")
    one = live.weights.fused_buffer_bytes
    live.apply()
    live.prepare("attention")
    assert live.weights.fused_buffer_bytes == one


def test_what_is_prepared_keeps_no_adapter_alive() -> None:
    live, down = Live(), torch.ones(1, 32)
    delta = LowRank(down, torch.ones(32, 1), 1.0, 1.0)
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    prepared = live.weights.prepare([(ParsedAdapter("one", {"unet": {layer: delta}}, Coverage(1, 1)), 1.0)])
    kept = weakref.ref(down)
    del down, delta
    gc.collect()
    assert kept() is None
    assert prepared.key == (("one", 1.0),)
