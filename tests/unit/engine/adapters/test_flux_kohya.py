"""Kohya's FLUX files: the layers outside the blocks count too, though diffusers loses them on their way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from serve_app.engine.adapters.deltas import LowRank
from serve_app.engine.adapters.parser import parse_adapter
from serve_app.engine.base.manifest import manifest_of
from serve_app.settings import AdapterLimits
from tests.tiny import tiny_pipeline
from tests.tiny_forms import Form, flux_kohya, fused_by_diffusers, put, unequal, weights_of

TOP = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in_in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in_out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in_in_layer": "time_text_embed.text_embedder.linear_1",
    "guidance_in_out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer_linear": "proj_out",
    "final_layer_adaLN_modulation_1": "norm_out.linear",
}


def top_layers(alpha: float | None, rank: int = 4) -> dict[str, Tensor]:
    """Return kohya's keys for the layers outside the blocks."""
    transformer, random = tiny_pipeline("flux").transformer, torch.Generator().manual_seed(1)
    tensors: dict[str, Tensor] = {}
    for kohya, name in TOP.items():
        out, inputs = transformer.get_submodule(name).weight.shape
        tensors[f"lora_unet_{kohya}.lora_down.weight"] = torch.randn(rank, inputs, generator=random) * 0.1
        tensors[f"lora_unet_{kohya}.lora_up.weight"] = torch.randn(out, rank, generator=random) * 0.1
        if alpha is not None:
            tensors[f"lora_unet_{kohya}.alpha"] = torch.tensor(alpha)
    return tensors


@pytest.mark.parametrize("alpha", [None, 2.0])
def test_layers_outside_the_blocks_are_applied_at_their_own_alpha(alpha: float | None, tmp_path: Path) -> None:
    pipeline, tensors = tiny_pipeline("flux"), top_layers(alpha)
    path = put(tmp_path, "kohya", Form(flux_kohya(pipeline) | tensors))
    adapter = parse_adapter(path, "a/b", manifest_of(pipeline), AdapterLimits())
    assert adapter.coverage.layers_matched == adapter.coverage.layers_in_file
    for kohya, name in TOP.items():
        delta = adapter.components["transformer"][name]
        assert isinstance(delta, LowRank)
        up, down = (tensors[f"lora_unet_{kohya}.lora_{half}.weight"] for half in ("up", "down"))
        if name == "norm_out.linear":  # shift and scale change places between the two implementations
            up = torch.cat(up.chunk(2)[::-1])
        expected = up @ down * (1.0 if alpha is None else alpha / 4)
        torch.testing.assert_close(delta.up @ delta.down * delta.factor(1.0), expected)


def test_diffusers_itself_changes_none_of_them(tmp_path: Path) -> None:
    """Why no bit can be compared: this says so when it becomes otherwise."""
    path = put(tmp_path, "kohya", Form(flux_kohya(tiny_pipeline("flux")) | top_layers(2.0)))
    fused = weights_of(fused_by_diffusers("flux", torch.float32, [(path, 1.0)]))
    changed = {name.removesuffix(".weight") for _, name in unequal(fused, weights_of(tiny_pipeline("flux")))}
    assert changed
    assert not changed & set(TOP.values())
