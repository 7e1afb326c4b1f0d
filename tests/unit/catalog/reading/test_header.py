from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from serve_app.catalog.reading.header import MalformedHeader, describe, parse_header, read_header
from serve_app.families.structure import published
from tests.unit.catalog.builders import BLOCK, lora, pair


def facts(tensors: dict[str, np.ndarray], **metadata: str):
    return describe(parse_header(save(tensors, metadata=metadata or None)))


def raw(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def spelled(down: str, up: str, width: int = 768) -> dict[str, np.ndarray]:
    return {down: np.ones((4, width), np.float32), up: np.ones((320, 4), np.float32)}


@pytest.mark.parametrize(
    ("down", "up"),
    [
        (f"{BLOCK}.attn2.to_k.lora_A.weight", f"{BLOCK}.attn2.to_k.lora_B.weight"),
        (f"{BLOCK}.attn2.to_k.lora_A.default.weight", f"{BLOCK}.attn2.to_k.lora_B.default.weight"),
        (f"{BLOCK}.attn2.to_k.lora.down.weight", f"{BLOCK}.attn2.to_k.lora.up.weight"),
        (f"{BLOCK}.attn2.processor.to_k_lora.down.weight", f"{BLOCK}.attn2.processor.to_k_lora.up.weight"),
        (
            f"{BLOCK}.attn2.to_k.lora_linear_layer.down.weight",
            f"{BLOCK}.attn2.to_k.lora_linear_layer.up.weight",
        ),
        (
            "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight",
            "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_B.weight",
        ),
        (
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight",
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_up.weight",
        ),
        (
            "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight",
            "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_up.weight",
        ),
    ],
)
def test_every_spelling_of_a_pair_tells_the_width_of_the_text_features(down: str, up: str):
    found = facts(spelled(down, up))
    assert found.has_pairs
    assert found.components == {"unet"}
    assert (found.text_width, found.family, found.max_rank) == (768, "sd1", 4)


@pytest.mark.parametrize(("width", "family"), [(768, "sd1"), (1024, "sd2"), (2048, "sdxl"), (64, None)])
def test_the_cross_attention_width_tells_the_family(width: int, family: str | None):
    assert facts(pair(f"{BLOCK}.attn2.to_k", width)).family == family


def test_self_attention_alone_tells_block_widths_and_no_family():
    found = facts(pair(f"{BLOCK}.attn1.to_q", 320) | pair(f"{BLOCK}.attn1.to_k", 640))
    assert found.text_width is None
    assert found.hidden_widths == {320, 640}
    assert found.family is None


def test_a_convolution_counts_its_input_channels():
    conv = {
        f"{BLOCK}.attn2.to_k.lora_A.weight": np.ones((4, 768, 1, 1), np.float32),
        f"{BLOCK}.attn2.to_k.lora_B.weight": np.ones((320, 4, 1, 1), np.float32),
    }
    assert facts(conv).text_width == 768


@pytest.mark.parametrize(
    ("module", "width", "families"),
    [
        ("transformer.single_transformer_blocks.0.attn.to_q", 3072, {"flux", "chroma", "fibo"}),
        ("transformer.single_transformer_blocks.0.norm.linear", 3072, {"flux", "fibo"}),
        ("transformer.transformer_blocks.8.norm1.linear", 3072, {"flux", "sd3"}),
        ("transformer.caption_projection.3.linear", 2048, {"fibo"}),
        ("lora_unet_single_blocks_0_modulation_lin", 3072, {"flux"}),
        ("lora_unet_double_blocks_0_img_attn_qkv", 3072, {"flux", "chroma", "flux2"}),
        ("transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj", 6144, {"flux2"}),
        ("distilled_guidance_layer.layers.0.in_layer", 5120, {"chroma"}),
        ("transformer.transformer_blocks.0.attn.to_q", 1536, {"sd3"}),
        ("lora_unet_joint_blocks_3_x_block_attn_qkv", 1536, {"sd3"}),
        ("transformer.transformer_blocks.0.attn.to_q", 3072, {"flux", "chroma", "flux2", "qwen-image", "fibo"}),
        ("transformer.transformer_blocks.8.attn.to_q", 3072, {"flux", "chroma", "flux2", "qwen-image"}),
        ("transformer.transformer_blocks.0.img_mod.1", 3072, {"qwen-image"}),
        ("diffusion_model.layers.0.attention.to_q", 3840, {"z-image"}),
        ("diffusion_model.layers.0.attention.qkv", 2304, {"lumina2"}),
        ("diffusion_model.blocks.3.self_attn.q", 5120, {"wan"}),
    ],
)
def test_names_and_widths_tell_the_families_that_a_transformer_can_be_of(module: str, width: int, families: set[str]):
    found = facts(pair(module, width))
    assert found.components == {"transformer"}
    assert published(found.families, found.hidden_widths) == families
    assert found.family == (next(iter(families)) if len(families) == 1 else None)


def test_kohya_metadata_states_the_family_where_structure_does_not():
    module = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    found = facts(pair(module, 768), ss_base_model_version="sdxl_base_v1-0")
    assert found.components == {"text_encoder"}
    assert found.family == "sdxl"


def test_structure_wins_over_what_the_metadata_states():
    found = facts(pair(f"{BLOCK}.attn2.to_k", 768), ss_base_model_version="sdxl_base_v1-0")
    assert found.family == "sd1"


def test_full_differences_are_an_adapter_without_a_rank():
    found = facts({f"{BLOCK}.attn2.to_k.diff": np.ones((320, 768), np.float32)})
    assert found.has_pairs
    assert (found.methods, found.family, found.max_rank) == ({"full"}, "sd1", 0)


def test_weights_without_pairs_are_no_adapter():
    assert not facts({"conv_in.weight": np.ones((2, 2), np.float32)}).has_pairs
    assert not facts({f"{BLOCK}.attn2.to_k.lora_A.weight": np.ones((4, 64), np.float32)}).has_pairs


def test_language_model_adapters_have_pairs_but_no_image_component():
    found = facts(pair("base_model.model.model.layers.0.self_attn.q_proj", 4096))
    assert found.has_pairs
    assert found.components == frozenset()


def test_other_methods_are_named():
    module = f"{BLOCK}.attn2.to_k"
    loha = {f"{module}.hada_w1_{side}": np.ones((4, 4), np.float32) for side in "ab"}
    lokr = {
        f"{module}.lokr_w1": np.ones((2, 8), np.float32),
        f"{module}.lokr_w2_a": np.ones((160, 4), np.float32),
        f"{module}.lokr_w2_b": np.ones((4, 96), np.float32),
    }
    dora = pair(module, 768) | {f"{module}.lora_magnitude_vector": np.ones(320, np.float32)}
    assert facts(loha).methods == {"loha"}
    assert (facts(lokr).methods, facts(lokr).text_width) == ({"lokr"}, 768)
    assert facts(dora).methods == {"lora", "dora"}


def test_a_local_file_gives_the_same_header_as_its_first_bytes(tmp_path: Path):
    content = lora()
    (tmp_path / "x.safetensors").write_bytes(content)
    assert read_header(tmp_path / "x.safetensors") == parse_header(content, file_bytes=len(content))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "too short"),
        (b"1234567", "too short"),
        ((2**40).to_bytes(8, "little") + b"{}", "claims"),
        ((100).to_bytes(8, "little") + b"{}", "truncated within its header"),
        (raw(b"not json"), "not JSON"),
        (raw(b"\xff\xfe{}"), "not JSON"),
        (raw(b"[" * 100_000), "not JSON"),
        (raw([1]), "not a table"),
        (raw({"a": 7}), "lacks dtype"),
        (raw({"a": {"dtype": "F32", "shape": [1]}}), "lacks dtype"),
        (raw({"a": entry([1], 0, 4) | {"data_offsets": [0]}}, b"0000"), "lacks dtype"),
        (raw({"a": entry([-1], 0, 4)}, b"0000"), "cannot be"),
        (raw({"a": entry([True], 0, 4)}, b"0000"), "cannot be"),
        (raw({"a": entry([2**60], 0, 4)}, b"0000"), "cannot be"),
        (raw({"a": entry([2], 0, 4)}, b"0000"), "do not hold its shape"),
        (raw({"a" * 600: entry([1], 0, 4)}, b"0000"), "over 512"),
        (raw({"a": entry([2], 0, 8)}, b"0000"), "is truncated: 8 bytes"),
        (raw({"a": entry([1], 0, 4)}, b"00000000"), "4 bytes that its header does not describe"),
    ],
)
def test_a_header_that_does_not_describe_its_file_is_refused(content: bytes, why: str):
    with pytest.raises(MalformedHeader, match=why):
        parse_header(content, file_bytes=len(content))


@pytest.mark.parametrize("name", ["{index:x}", "unet.down_blocks.{index}.attn2.to_k.lora_A.weight"])
def test_a_header_of_very_many_tensors_is_refused_before_it_is_parsed(name: str, monkeypatch: pytest.MonkeyPatch):
    entries = ",".join(
        f'"{name.format(index=index)}":{{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}' for index in range(100_001)
    )
    text = f"{{{entries}}}".encode()
    monkeypatch.setattr(json, "loads", lambda _: pytest.fail("it was parsed"))
    with pytest.raises(MalformedHeader, match="over 100000 tensors"):
        parse_header(len(text).to_bytes(8, "little") + text)
