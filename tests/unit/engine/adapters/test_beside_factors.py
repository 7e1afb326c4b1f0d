"""What files hold beside pairs of factors: biases, norms, words, channels that are missing, tensors of no layer."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from serve_app.engine.adapters.deltas import Hadamard, ParsedAdapter
from serve_app.engine.adapters.parser import parse_adapter
from serve_app.engine.base.manifest import BaseManifest, Layer
from serve_app.engine.weights.fuse import weight_delta
from serve_app.refusals import NotAnAdapter, RefusedAdapter
from serve_app.settings import AdapterLimits
from tests.adapter_changes import changes
from tests.spelt_adapters import SPELLINGS, base_of, spelt


def read(folder: Path, tensors: dict[str, Tensor], manifest: BaseManifest) -> ParsedAdapter:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "a.safetensors")
    return parse_adapter(folder / "a.safetensors", "a/b", manifest, AdapterLimits())


def test_a_change_of_the_bias_beside_factors_is_added_at_the_scale_alone(tmp_path: Path) -> None:
    base = base_of("flux")
    tensors, truth = spelt(base, SPELLINGS["ComfyUI, original names"], "LoRA with alpha")
    for number, (name, modules) in enumerate(base.originals.items()):
        rows = len(base.weight(modules))
        bias = torch.randn(rows, generator=torch.Generator().manual_seed(number))
        tensors[f"diffusion_model.{name}.diff_b"] = bias
        pieces = bias.double().split([len(base.weight([module])) for module in modules])
        truth |= {f"{module}.bias": piece for module, piece in zip(modules, pieces, strict=True)}
    found = changes(base, read(tmp_path, tensors, base.manifest))
    assert found.keys() == truth.keys()
    for name, expected in truth.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=2e-6, msg=name)


@pytest.mark.parametrize(
    "key",
    [
        "diffusion_model.double_blocks.0.img_attn.norm.query_norm.scale.diff",
        "transformer.transformer_blocks.0.attn.norm_q.diff",
        "lycoris_transformer_blocks_0_attn_norm_q.w_norm",
    ],
)
def test_a_change_of_a_norm_is_applied(key: str, tmp_path: Path) -> None:
    base = base_of("flux")
    found = changes(base, read(tmp_path, {key: torch.full((16,), 0.5)}, base.manifest))
    assert list(found) == ["transformer_blocks.0.attn.norm_q"]
    torch.testing.assert_close(found["transformer_blocks.0.attn.norm_q"], torch.full((16,), 0.5).double())


def test_words_bundled_with_the_file_are_its_own_words(tmp_path: Path) -> None:
    base = base_of("sd15")
    tensors, _ = spelt(base, SPELLINGS["kohya, diffusers' names"], "LoRA")
    ti_tokens = torch.randn(3, 32)
    tensors |= {"bundle_emb.style.string_to_param.*": ti_tokens[:2], "bundle_emb.person.clip_l": ti_tokens[2]}
    adapter = read(tmp_path, tensors, base.manifest)
    assert adapter.coverage.layers_matched == adapter.coverage.layers_in_file
    # Safetensors files are ordered by name.
    torch.testing.assert_close(adapter.ti_tokens["text_encoder"], ti_tokens[[2, 0, 1]])


def test_tensors_of_no_layer_are_reported_and_the_others_applied(tmp_path: Path) -> None:
    base = base_of("sd15")
    tensors, truth = spelt(base, SPELLINGS["kohya, diffusers' names"], "LoRA")
    extras = {"iteration": torch.tensor(7), "v_pred": torch.zeros(0), "flag": torch.tensor(True)}
    adapter = read(tmp_path, tensors | extras, base.manifest)
    assert set(adapter.coverage.unmatched) == set(extras)
    assert adapter.coverage.layers_in_file == adapter.coverage.layers_matched + 3
    assert changes(base, adapter).keys() == truth.keys()


def test_channels_that_an_adapter_of_the_ordinary_base_does_not_know_stay_as_they_are(tmp_path: Path) -> None:
    base = base_of("flux")
    down, up = torch.randn(4, 16), torch.randn(64, 4)
    layers = {**base.manifest.components["transformer"], "x_embedder": Layer("linear", (64, 96), True, "float32")}
    wide = BaseManifest("P", "transformer", "float32", None, {"transformer": layers}, "")
    tensors = {"transformer.x_embedder.lora_A.weight": down, "transformer.x_embedder.lora_B.weight": up}
    delta = read(tmp_path, tensors, wide).components["transformer"]["x_embedder"]
    change = weight_delta(delta, torch.zeros(64, 96), 1.0)  # type: ignore[arg-type]
    torch.testing.assert_close(change[:, :16], up @ down)
    assert not change[:, 16:].any()


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0, -1.0, 2.0])
@pytest.mark.parametrize("method", ["DoRA, a magnitude per output", "DoRA, a magnitude per input", "LoKr with DoRA"])
def test_a_dora_in_kohyas_names_is_scaled_whole(method: str, scale: float, tmp_path: Path) -> None:
    """As ComfyUI and A1111 do it: W + scale * (DoRA(W) - W)."""
    base = base_of("sd15")
    tensors, truth = spelt(base, SPELLINGS["kohya, diffusers' names"], method)
    found = changes(base, read(tmp_path, tensors, base.manifest), scale)
    for name, expected in truth.items():
        torch.testing.assert_close(found[name], scale * expected, rtol=1e-4, atol=2e-6, msg=name)


@pytest.mark.parametrize("left_over", ["lora_down.weight", "lora_mid.weight", "unheard_of.alpha"])
def test_a_part_of_another_method_in_a_fused_lokr_projection_is_not_lost(left_over: str, tmp_path: Path) -> None:
    base = base_of("flux")
    tensors, _ = spelt(base, SPELLINGS["ComfyUI, original names"], "LoKr")
    tensors[f"diffusion_model.double_blocks.0.img_attn.qkv.{left_over}"] = torch.ones(4, 64)
    if left_over == "unheard_of.alpha":
        assert len(read(tmp_path, tensors, base.manifest).coverage.unmatched) == 1
    else:
        with pytest.raises(RefusedAdapter):
            read(tmp_path, tensors, base.manifest)


def test_an_adapter_that_changes_nothing_is_refused(tmp_path: Path) -> None:
    base = base_of("sd15")
    tensors, _ = spelt(base, SPELLINGS["kohya, diffusers' names"], "LoRA with alpha")
    zeros = {key: tensor * 0 if key.endswith(".alpha") else tensor for key, tensor in tensors.items()}
    with pytest.raises(NotAnAdapter, match="changes nothing"):
        read(tmp_path, zeros, base.manifest)


def test_an_empty_tensor_may_share_the_offset_of_another(tmp_path: Path) -> None:
    base = base_of("sd15")
    tensors, _ = spelt(base, SPELLINGS["kohya, diffusers' names"], "LoRA")
    read(tmp_path, tensors, base.manifest)
    content = (tmp_path / "a.safetensors").read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length]) | {"v_pred": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}
    text = json.dumps(header).encode()
    (tmp_path / "b.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    adapter = parse_adapter(tmp_path / "b.safetensors", "a/b", base.manifest, AdapterLimits())
    assert adapter.coverage.unmatched == ("v_pred",)


def test_loha_halves_may_leave_the_range_that_their_product_stays_in() -> None:
    large, small = torch.full((8, 1), 300.0).half(), torch.full((8, 1), 0.01).half()
    delta = Hadamard(large, large.T.contiguous(), small, small.T.contiguous(), 1.0, 1.0)
    assert weight_delta(delta, torch.zeros(8, 8, dtype=torch.float16), 1.0).isfinite().all()
