"""Memory is flat however many adapters come and go."""

from __future__ import annotations

import gc
from pathlib import Path

import psutil
import pytest

from serve_app.engine.adapters.canonical import read_canonical, write_canonical
from serve_app.engine.base.manifest import adaptable_components, manifest_of
from serve_app.engine.weights.fused import FusedWeights
from serve_app.store.budget import ByteBudget
from tests.engine_cases import parsed_adapter
from tests.tiny import tiny_pipeline

ADAPTERS, SWAPS, WARM_UP = 200, 2000, 400


@pytest.mark.slow
def test_two_thousand_swaps_among_two_hundred_adapters_take_no_more_memory(tmp_path: Path) -> None:
    pipeline = tiny_pipeline("sd15")
    manifest, weights = manifest_of(pipeline), FusedWeights(adaptable_components(pipeline))
    for seed in range(ADAPTERS):
        write_canonical(parsed_adapter(manifest, seed=seed), tmp_path / str(seed))
    size = read_canonical(tmp_path / "0").size_bytes
    budget, resident = ByteBudget(50 * size), {}
    process, used = psutil.Process(), []
    for turn in range(SWAPS):
        key = str(turn * 7 % ADAPTERS)
        if key not in resident:
            resident[key] = read_canonical(tmp_path / key)
            for evicted in budget.add(key, size).evict:
                del resident[evicted]
        composition = [(resident[key], 1.0)]
        if turn % 2:
            weights.bind(weights.prepare(composition))
        else:
            weights.apply(composition)
        if turn >= WARM_UP and turn % 100 == 0:
            gc.collect()
            used.append(process.memory_full_info().uss)
    assert max(used) < 1.05 * used[0]
    assert weights.fused_buffer_bytes <= 2 * sum(tensor.nbytes for tensor in weights.base_tensors.values())
