from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save

from serve_app.catalog.reading.base_match import match_bases
from serve_app.catalog.reading.bases import BaseArchitecture
from serve_app.catalog.reading.header import HeaderFacts, describe, parse_header
from serve_app.refusals import NoLayerMatches, ShapeMismatch
from tests.unit.catalog.builders import BLOCK, pair

SD = BaseArchitecture("sd", "sd1", "unet", 768, frozenset({320, 640, 1280}))
TUNED = BaseArchitecture("tuned", "sd1", "unet", 768, frozenset({320, 640, 1280}))
SDXL = BaseArchitecture("sdxl", "sdxl", "unet", 2048, frozenset({320, 640, 1280}))
FLUX = BaseArchitecture("flux", "flux", "transformer")
UNREAD = BaseArchitecture("unread")


def header(tensors: dict[str, np.ndarray], **metadata: str) -> HeaderFacts:
    return describe(parse_header(save(tensors, metadata=metadata or None)))


CROSS_SD = header(pair(f"{BLOCK}.attn2.to_k", 768))
CROSS_SDXL = header(pair(f"{BLOCK}.attn2.to_k", 2048))
SELF_ONLY = header(pair(f"{BLOCK}.attn1.to_q", 320))
NARROW_SELF = header(pair(f"{BLOCK}.attn1.to_q", 32))
FLUX_FILE = header(pair("transformer.single_transformer_blocks.0.attn.to_q", 3072))


def test_the_card_decides_where_the_structure_allows():
    placed = match_bases("a", ["sdxl"], ["sdxl"], CROSS_SDXL, [SD, SDXL])
    assert (placed.bases, placed.is_ambiguous) == (("sdxl",), False)


def test_of_several_bases_that_the_card_names_those_that_fit_remain():
    assert match_bases("a", ["sd", "sdxl"], ["sd", "sdxl"], CROSS_SDXL, [SD, SDXL]).bases == ("sdxl",)


def test_a_card_that_the_widths_contradict_is_refused_naming_both_bases():
    with pytest.raises(ShapeMismatch) as refusal:
        match_bases("a/b", ["sd"], ["sd"], CROSS_SDXL, [SD, SDXL])
    for word in ("a/b", "sd", "2048", "768", "sdxl"):
        assert word in str(refusal.value)


def test_a_card_that_the_block_widths_contradict_is_refused():
    with pytest.raises(ShapeMismatch, match=r"self-attention is 32 wide.*320, 640, 1280"):
        match_bases("a/b", ["sd"], ["sd"], NARROW_SELF, [SD])


def test_another_kind_of_network_matches_no_layer():
    with pytest.raises(NoLayerMatches, match="sd has a unet"):
        match_bases("a/b", ["sd"], ["sd"], FLUX_FILE, [SD, FLUX])


def test_a_card_that_names_an_unserved_base_is_placed_nowhere():
    placed = match_bases("a", ["other/base"], [], CROSS_SD, [SD])
    assert (placed.bases, placed.made_for) == ((), "other/base")


def test_without_a_card_the_widths_decide():
    assert match_bases("a", [], [], CROSS_SDXL, [SD, SDXL, UNREAD]).bases == ("sdxl",)
    assert match_bases("a", [], [], FLUX_FILE, [SD, FLUX]).bases == ("flux",)


def test_without_a_card_several_fitting_bases_are_ambiguous():
    placed = match_bases("a", [], [], CROSS_SD, [SD, TUNED, SDXL])
    assert (placed.bases, placed.is_ambiguous) == (("sd", "tuned"), True)
    assert match_bases("a", [], [], SELF_ONLY, [SD, SDXL]).is_ambiguous


def test_a_single_base_is_no_guess_for_a_file_that_fits_another_family_as_well():
    placed = match_bases("a", [], [], FLUX_FILE, [SD, FLUX])
    assert (placed.bases, placed.is_ambiguous, placed.rivals) == (("flux",), True, ("chroma", "fibo"))
    whole = header(pair("transformer.transformer_blocks.0.norm1.linear", 3072))
    modulated = header(
        pair("transformer.transformer_blocks.18.attn.to_q", 3072)
        | pair("transformer.single_transformer_blocks.0.norm.linear", 3072)
    )
    for facts in (modulated, whole):
        assert "chroma" not in match_bases("a", [], [], facts, [SD, FLUX]).rivals
    assert not match_bases("a", [], [], modulated, [SD, FLUX]).is_ambiguous
    assert not match_bases("a", ["flux"], ["flux"], FLUX_FILE, [SD, FLUX]).is_ambiguous


def test_what_the_file_states_of_itself_tells_equal_structures_apart():
    stated = header(pair(f"{BLOCK}.attn1.to_q", 320), ss_base_model_version="sdxl_base_v1-0")
    assert match_bases("a", [], [], stated, [SD, SDXL]).bases == ("sdxl",)


def test_a_file_that_fits_two_families_is_ambiguous_where_both_are_served():
    chroma = BaseArchitecture("chroma", "chroma", "transformer")
    placed = match_bases("a", [], [], FLUX_FILE, [SD, FLUX, chroma])
    assert (placed.bases, placed.is_ambiguous) == (("flux", "chroma"), True)
    stated = header(
        pair("transformer.single_transformer_blocks.0.attn.to_q", 3072), **{"modelspec.architecture": "flux-1-dev/lora"}
    )
    assert match_bases("a", [], [], stated, [SD, FLUX, chroma]).bases == ("flux",)


def test_widths_and_numbers_of_blocks_tell_one_family_from_another():
    deep = header(pair("transformer.transformer_blocks.40.attn.to_q", 3072))
    flux = BaseArchitecture("flux", "flux", "transformer", None, frozenset({3072}), (("double", 19), ("single", 38)))
    qwen = BaseArchitecture("qwen", "qwen-image", "transformer", None, frozenset({3072}), (("double", 60),))
    sd3 = BaseArchitecture("sd3", "sd3", "transformer", None, frozenset({1536}), (("double", 24),))
    assert match_bases("a", [], [], deep, [flux, qwen, sd3]).bases == ("qwen",)


def test_a_base_that_the_file_fits_serves_by_name_what_its_card_made_for_an_unserved_fine_tune():
    placed = match_bases("a", ["someone/fine-tune"], [], CROSS_SDXL, [SD, SDXL])
    assert (placed.bases, placed.made_for, placed.by_name) == ((), "someone/fine-tune", ("sdxl",))


def test_without_a_card_and_without_a_fitting_base_it_is_placed_nowhere():
    placed = match_bases("a", [], [], CROSS_SDXL, [SD])
    assert (placed.bases, placed.made_for) == ((), "sdxl")
    assert match_bases("a", [], [], FLUX_FILE, [SD, SDXL]).bases == ()


def test_a_base_of_unknown_structure_contradicts_nothing():
    assert match_bases("a", ["unread"], ["unread"], CROSS_SDXL, [UNREAD]).bases == ("unread",)
