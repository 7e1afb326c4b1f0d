"""Whatever was applied, failed or rescaled before, what is bound equals what a fresh base would have."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from serve_app.engine.base.manifest import adaptable_components
from serve_app.engine.weights.fused import FusedWeights, adapter_set_key
from tests.tiny import tiny_pipeline
from tests.tiny_compositions import ADAPTERS, BROKEN, adapter, composition, digest_of, freshly_bound

SCALES = (0.0, 0.3, -1.0, 1.0, 2.5)
MEMBERS = st.tuples(st.sampled_from([*ADAPTERS, BROKEN]), st.sampled_from(SCALES))


class CountProducts(TorchDispatchMode):
    """Counts the operations on tensors."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "mm" in str(func) or "mul" in str(func)
        return func(*args, **(kwargs or {}))


HISTORIES = st.lists(st.lists(MEMBERS, max_size=3, unique_by=lambda member: member[0]), min_size=1, max_size=8)


@pytest.mark.parametrize(
    ("dtype", "base_weights", "fused_sets"),
    [
        pytest.param(torch.float32, "device", 1, marks=pytest.mark.slow),
        (torch.bfloat16, "device", 3),
        pytest.param(torch.bfloat16, "host", 1, marks=pytest.mark.slow),
        (torch.float16, "host", 1),
    ],
    ids=str,
)
def test_any_history_leaves_what_a_fresh_base_would_have(
    dtype: torch.dtype, base_weights: Literal["device", "host"], fused_sets: int
) -> None:
    components = adaptable_components(tiny_pipeline("sd15", dtype))
    weights = FusedWeights(components, base_weights=base_weights, fused_sets=fused_sets)
    pristine = weights.checksum()

    @settings(max_examples=12, deadline=None, derandomize=True, database=None)
    @given(HISTORIES)
    def check(history: list[list[tuple[str, float]]]) -> None:
        for members in history:
            if any(name == BROKEN for name, _ in members):
                with pytest.raises(KeyError):
                    weights.apply(composition(tuple(members), dtype))
                members = []
            else:
                weights.apply(composition(tuple(members), dtype))
            assert digest_of(components) == freshly_bound(tuple(members), dtype)

    check()  # one live base sees every history, one after another
    assert weights.checksum() == pristine
    weights.apply([])
    assert digest_of(components) == freshly_bound((), dtype)


def test_what_is_still_in_buffers_is_bound_from_there_and_the_least_recently_bound_makes_way() -> None:
    components = adaptable_components(tiny_pipeline("sd15", torch.bfloat16))
    weights = FusedWeights(components, fused_sets=2)
    bound = {name: composition(((name, 1.0),), torch.bfloat16) for name in ("attention", "text", "kohya")}

    def change(name: str) -> bool:
        """Change to an adapter; return whether its layers were computed."""
        is_kept = adapter_set_key(bound[name]) in weights.kept
        with CountProducts() as products:
            weights.apply(bound[name])
        assert digest_of(components) == freshly_bound(((name, 1.0),), torch.bfloat16)
        assert is_kept is (products.count == 0)
        return not is_kept

    assert [change(name) for name in ("attention", "text", "attention", "text")] == [True, True, False, False]
    two_sets = weights.fused_buffer_bytes
    weights.apply([])
    assert not change("attention")
    assert change("kohya")  # in the place of "text"
    assert not change("attention")
    assert change("text")
    weights.drop_spares()
    assert weights.kept == {adapter_set_key(bound["text"]), ()}
    assert weights.fused_buffer_bytes < two_sets
    assert digest_of(components) == freshly_bound((("text", 1.0),), torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("base_weights", ["device", "host"])
def test_a_thousand_swaps_change_no_bit_of_the_base(base_weights: Literal["device", "host"]) -> None:
    components = adaptable_components(tiny_pipeline("sd15", torch.bfloat16))
    weights = FusedWeights(components, base_weights=base_weights)
    pristine, base = weights.checksum(), digest_of(components)
    names = ("attention", "text", "kohya")
    for turn in range(1000):
        weights.apply([(adapter(names[turn % 3], torch.bfloat16), 0.5 + turn % 7)])
    memory = weights.fused_buffer_bytes
    weights.apply([])
    assert (weights.checksum(), digest_of(components), weights.fused_buffer_bytes) == (pristine, base, memory)
