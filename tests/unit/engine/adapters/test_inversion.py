"""The words beside an adapter are read for the right text encoders, or refused with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from serve_app.engine.adapters.canonical import read_canonical, write_canonical
from serve_app.engine.adapters.deltas import ParsedAdapter
from serve_app.engine.adapters.inversion import ti_tokens_of
from serve_app.engine.adapters.parser import parse_adapter
from serve_app.engine.base.manifest import BaseManifest, manifest_of
from serve_app.errors import MalformedRequest
from serve_app.refusals import MalformedFile, NonFinite, RefusedAdapter, ShapeMismatch, UnsafeFile, UnsupportedMethod
from serve_app.settings import AdapterLimits
from tests.tiny import tiny_pipeline
from tests.tiny_adapters import lora, write
from tests.tiny_forms import Form, put
from tests.tiny_words import NAMES, embeddings, numbered


def read(folder: Path, family: str, ti_tokens: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> ParsedAdapter:
    pipeline = tiny_pipeline(family, dtype)
    path = put(folder, "adapter", Form(lora(pipeline)))
    beside = write(folder / "adapter_emb.safetensors", ti_tokens)
    return parse_adapter(path, "owner/adapter", manifest_of(pipeline), AdapterLimits(), beside)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", NAMES)
def test_both_spellings_mean_the_same_text_encoders(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    ti_tokens = embeddings(family, ti_tokens=3)
    for spelt in (ti_tokens, numbered(ti_tokens)):
        adapter = read(tmp_path, family, spelt, dtype)
        assert list(adapter.ti_tokens) == list(NAMES[family].values())
        for name, component in NAMES[family].items():
            assert adapter.ti_tokens[component].dtype == dtype
            assert torch.equal(adapter.ti_tokens[component], ti_tokens[name].to(dtype))


def test_one_word_may_be_a_vector_and_one_text_encoder_may_be_left_out(tmp_path: Path) -> None:
    adapter = read(tmp_path, "sdxl", {"text_encoders_1": torch.ones(32)})
    assert {name: rows.shape for name, rows in adapter.ti_tokens.items()} == {"text_encoder_2": (1, 32)}


def test_the_digest_tells_adapters_apart_that_differ_in_their_words_alone(tmp_path: Path) -> None:
    first, again, other = (read(tmp_path, "sd15", embeddings("sd15", seed=seed)) for seed in (1, 1, 2))
    path, manifest = tmp_path / "adapter.safetensors", manifest_of(tiny_pipeline("sd15"))
    plain = parse_adapter(path, "x", manifest, AdapterLimits())
    assert first.digest == again.digest
    assert len({first.digest, other.digest, plain.digest}) == 3


def test_words_come_back_from_the_canonical_file_without_its_buffer(tmp_path: Path) -> None:
    adapter = read(tmp_path, "sdxl", embeddings("sdxl"))
    write_canonical(adapter, tmp_path / "canonical")
    back = read_canonical(tmp_path / "canonical")
    assert (back.digest, back.size_bytes) == (adapter.digest, adapter.size_bytes)
    assert list(back.ti_tokens) == list(adapter.ti_tokens)
    for component, rows in adapter.ti_tokens.items():
        assert torch.equal(back.ti_tokens[component], rows)
        assert back.ti_tokens[component].untyped_storage().nbytes() == rows.nbytes


def test_a_manifest_keeps_its_vocabularies_on_its_way_to_another_process() -> None:
    manifest = manifest_of(tiny_pipeline("flux"))
    assert {name: one.kind for name, one in manifest.vocabularies.items()} == {
        "text_encoder": "clip",
        "text_encoder_2": "t5",
    }
    assert BaseManifest.from_json(manifest.to_json()) == manifest


@pytest.mark.parametrize(
    ("ti_tokens", "error", "reason"),
    [
        ({"clip_l": torch.ones(2, 31)}, ShapeMismatch, r"shape \[2, 31\], but words are 32 wide"),
        ({"clip_l": torch.ones(1, 1, 32)}, ShapeMismatch, "words are 32 wide"),
        ({"clip_l": torch.ones(0, 32)}, MalformedFile, "hold 0 words"),
        ({"clip_l": torch.ones(257, 32)}, MalformedFile, "from 1 to 256 are read"),
        ({"clip_l": torch.full((2, 32), float("nan"))}, NonFinite, "NaN or infinite"),
        ({"clip_l": torch.full((2, 32), 1e30)}, NonFinite, "NaN or infinite"),
        ({"t5": torch.ones(2, 32)}, MalformedFile, "hold t5, but the text encoders of this base are"),
        ({"<cat>": torch.ones(32)}, MalformedFile, "hold <cat>"),
        ({"text_encoders_2": torch.ones(32)}, MalformedFile, "hold text_encoders_2"),
        ({"clip_l": torch.ones(32), "text_encoders_0": torch.ones(32)}, MalformedFile, "by another name"),
    ],
)
def test_words_that_do_not_fit_refuse_the_adapter(
    ti_tokens: dict[str, Tensor], error: type[RefusedAdapter], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=reason):
        read(tmp_path, "sdxl", ti_tokens, torch.float16)


def test_a_pickle_beside_the_adapter_is_refused(tmp_path: Path) -> None:
    pipeline = tiny_pipeline("sd15")
    path = put(tmp_path, "adapter", Form(lora(pipeline)))
    torch.save(embeddings("sd15"), tmp_path / "adapter_emb.safetensors")
    with pytest.raises(UnsafeFile):
        parse_adapter(path, "x", manifest_of(pipeline), AdapterLimits(), tmp_path / "adapter_emb.safetensors")


def test_a_family_that_diffusers_teaches_no_words_refuses_them(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedMethod, match="not served on StableDiffusion3Pipeline"):
        read(tmp_path, "sd3", {"clip_l": torch.ones(2, 32)})


def test_two_adapters_with_words_cannot_share_a_request(tmp_path: Path) -> None:
    adapter = read(tmp_path, "sd15", embeddings("sd15"))
    plain = parse_adapter(tmp_path / "adapter.safetensors", "x", manifest_of(tiny_pipeline("sd15")), AdapterLimits())
    assert ti_tokens_of([plain, adapter]) is adapter.ti_tokens
    assert ti_tokens_of([plain]) == {}
    with pytest.raises(MalformedRequest, match="name only one of them"):
        ti_tokens_of([adapter, adapter])
