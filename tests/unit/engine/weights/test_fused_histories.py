"""Whatever was applied, failed or rescaled before, what is bound equals what a fresh base would have."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.engine.base.manifest import adaptable_components
from serve_app.engine.weights.fused import FusedWeights
from tests.tiny import tiny_pipeline
from tests.tiny_compositions import ADAPTERS, BROKEN, adapter, composition, digest_of, freshly_bound

SCALES = (0.0, 0.3, -1.0, 1.0, 2.5)
MEMBERS = st.tuples(st.sampled_from([*ADAPTERS, BROKEN]), st.sampled_from(SCALES))
HISTORIES = st.lists(st.lists(MEMBERS, max_size=3, unique_by=lambda member: member[0]), min_size=1, max_size=8)


@pytest.mark.parametrize(
    ("dtype", "base_weights"),
    [(torch.float32, "device"), (torch.bfloat16, "device"), (torch.bfloat16, "host"), (torch.float16, "host")],
    ids=str,
)
def test_any_history_leaves_what_a_fresh_base_would_have(
    dtype: torch.dtype, base_weights: Literal["device", "host"]
) -> None:
    components = adaptable_components(tiny_pipeline("sd15", dtype))
    weights = FusedWeights(components, base_weights=base_weights)
    pristine = weights.checksum()

    @settings(max_examples=25, deadline=None, derandomize=True, database=None)
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
