from pathlib import Path

import pytest
import torch

from serve_app.bench.measuring.options import Model, SwapOptions, Targets
from serve_app.bench.models.adapter_files import as_kohya, draw_factors, write_adapter_files
from serve_app.bench.models.denoisers import fill_outline, outline_of
from serve_app.engine.adapters.deltas import ParsedAdapter, tensors_of
from serve_app.engine.adapters.parser import parse_adapter
from serve_app.engine.base.manifest import manifest_of
from serve_app.settings import AdapterLimits


@pytest.mark.parametrize("model", [Model.TINY, Model.SD15, pytest.param(Model.SDXL, marks=pytest.mark.slow)])
def test_both_spellings_hold_the_same_factors(model: Model, tmp_path: Path) -> None:
    options = SwapOptions(model=model, is_narrow=True, rank=2, targets=Targets.LINEAR)
    outline = outline_of(options)
    files = write_adapter_files(outline, options, tmp_path)
    manifest = manifest_of(fill_outline(outline, options).pipeline)
    assert files.kohya is not None
    first, kohya = (parse_adapter(path, "adapter", manifest, AdapterLimits()) for path in (files.first, files.kohya))
    assert kohya.coverage.layers_matched == first.coverage.layers_in_file == len(outline.targets(Targets.LINEAR))
    ours, theirs = _values(first), _values(kohya)
    assert all(torch.equal(one, other) for name in ours for one, other in zip(ours[name], theirs[name], strict=True))


def test_kohya_files_number_the_blocks_of_sdxl_as_its_original_implementation() -> None:
    layer = "transformer_blocks.9.attn1.to_q"
    blocks = ("down_blocks.1.attentions.0", "mid_block.attentions.0", "up_blocks.0.attentions.2")
    factors = draw_factors({f"{block}.{layer}": torch.Size((8, 8)) for block in blocks}, rank=2, seed=0)
    stems = {key.partition(".")[0] for key in as_kohya(factors, alpha=1.0, layers_per_block=2)}
    written = layer.replace(".", "_")
    assert stems == {f"lora_unet_{at}_{written}" for at in ("input_blocks_4_1", "middle_block_1", "output_blocks_2_1")}


def test_layers_and_seeds_have_factors_of_their_own() -> None:
    shapes = {"a": torch.Size((8, 8)), "b": torch.Size((8, 8))}
    first, other = draw_factors(shapes, 2, seed=0), draw_factors(shapes, 2, seed=1)
    assert not torch.equal(first["a"][0], first["b"][0])
    assert not torch.equal(first["a"][0], other["a"][0])


def _values(adapter: ParsedAdapter) -> dict[tuple[str, str], list[torch.Tensor]]:
    return {(component, module): list(tensors_of(delta)) for component, module, delta in adapter.layers()}
