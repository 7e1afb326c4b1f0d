"""A warm-up finds the largest batch that fits, and never ends a replica that could serve smaller ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from serve_app.engine.drawing.warmup import warm_up
from serve_app.engine.weights.fused import FusedWeights
from serve_app.engine.weights.made_up import warm_swaps
from serve_app.engine.weights.placement import WeightPlacement
from serve_app.engine.weights.shortage import is_out_of_memory
from tests.engine_cases import base_config, wrap
from tests.tiny import tiny_pipeline


def short_over(images: int) -> Any:
    """Return a pipeline whose denoiser finds no room for more images than that; guidance doubles them."""
    live: Any = tiny_pipeline("sd15")

    def check(module: Any, args: Any, kwargs: Any) -> None:
        sample = args[0] if args else kwargs["sample"]
        if len(sample) > 2 * images:
            raise torch.OutOfMemoryError("CUDA out of memory")

    live.unet.register_forward_pre_hook(check, with_kwargs=True)
    return live


@pytest.mark.parametrize(("fits", "found"), [(4, 4), (3, 2), (1, 1), (0, 0)])
def test_the_largest_batch_that_fits_is_found(fits: int, found: int) -> None:
    pipeline, config = wrap(short_over(fits)), base_config("sd15", defaults={"width": 64, "height": 64})
    assert config.replica.max_batch_images == 4
    assert warm_up(pipeline, config, torch_threads=1, is_out_of_memory=is_out_of_memory).images == found


def test_another_failure_is_raised() -> None:
    live: Any = tiny_pipeline("sd15")
    live.unet.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        warm_up(wrap(live), base_config("sd15"), torch_threads=1, is_out_of_memory=is_out_of_memory)


@pytest.mark.parametrize("prefetches_swap", [False, True])
def test_a_made_up_adapter_leaves_the_base_bound_and_the_buffers_made(*, prefetches_swap: bool) -> None:
    pipeline = wrap(tiny_pipeline("sd15"))
    weights = FusedWeights(pipeline.components)
    before = weights.checksum()
    warm_swaps(weights, pipeline.manifest, WeightPlacement("device", prefetches_swap))
    assert (weights.applied, weights.checksum()) == ((), before)
    linear = sum(
        layer.weight.nbytes
        for component in pipeline.components.values()
        for layer in component.modules()
        if isinstance(layer, torch.nn.Linear)
    )
    assert weights.fused_buffer_bytes >= (2 if prefetches_swap else 1) * linear


def test_a_shortage_while_a_swap_is_tried_leaves_the_base_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = wrap(tiny_pipeline("sd15"))
    weights = FusedWeights(pipeline.components)

    def no_room(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(weights, "reserve", no_room)
    warm_swaps(weights, pipeline.manifest, WeightPlacement("device", prefetches_swap=True))
    assert (weights.applied, weights.fused_buffer_bytes) == ((), 0)
