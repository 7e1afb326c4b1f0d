"""What a file becomes: names, factors, scales and coverage."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import Tensor

from serve_app.engine.adapters.deltas import Dora, Hadamard, Kronecker, LowRank, ParsedAdapter
from serve_app.engine.adapters.parser import parse_adapter
from serve_app.engine.base.manifest import manifest_of
from serve_app.engine.weights.fuse import weight_delta
from serve_app.refusals import NonFinite, RankTooHigh, RefusedAdapter, UnsupportedMethod
from serve_app.settings import AdapterLimits
from tests.tiny import tiny_pipeline
from tests.tiny_adapters import as_kohya, everything, loha, lokr, lora
from tests.tiny_forms import Form, described, put, with_text

LIMITS = AdapterLimits()


def read(
    folder: Path,
    tensors: dict[str, Tensor],
    metadata: dict[str, Any] | None = None,
    *,
    family: str = "sd15",
    dtype: torch.dtype = torch.float32,
    limits: AdapterLimits = LIMITS,
) -> ParsedAdapter:
    path = put(folder, "adapter", Form(tensors, metadata))
    return parse_adapter(path, "owner/adapter", manifest_of(tiny_pipeline(family, dtype)), limits)


def first_low_rank(adapter: ParsedAdapter) -> LowRank:
    _, _, delta = next(adapter.layers())
    assert isinstance(delta, LowRank)
    return delta


def stem(tensors: dict[str, Tensor]) -> str:
    return next(iter(tensors)).rpartition(".lora_")[0]


def test_the_digest_is_that_of_the_file(tmp_path: Path) -> None:
    adapter = read(tmp_path, lora(tiny_pipeline("sd15")))
    assert adapter.digest == hashlib.sha256((tmp_path / "adapter.safetensors").read_bytes()).hexdigest()


def test_factors_are_in_the_dtype_of_their_layer(tmp_path: Path) -> None:
    adapter = read(tmp_path, lora(tiny_pipeline("sd15"), dtype=torch.float32), dtype=torch.bfloat16)
    assert {delta.down.dtype for _, _, delta in adapter.layers() if isinstance(delta, LowRank)} == {torch.bfloat16}


def test_coverage_counts_layers_and_ranks(tmp_path: Path) -> None:
    tensors = lora(tiny_pipeline("sd15"), rank=lambda name: 3 if "attn1" in name else 5)
    coverage = read(tmp_path, tensors).coverage
    assert coverage.layers_matched == coverage.layers_in_file == len(tensors) // 2
    assert coverage.ranks == (3, 5)
    assert coverage.unmatched == ()


def test_layers_that_the_base_lacks_are_reported_and_the_others_read(tmp_path: Path) -> None:
    tensors = lora(tiny_pipeline("sd15"))
    strange = {"unet.gone.to_q.lora_A.weight": torch.zeros(4, 8), "unet.gone.to_q.lora_B.weight": torch.zeros(8, 4)}
    coverage = read(tmp_path, tensors | strange).coverage
    assert (coverage.layers_matched, coverage.layers_in_file) == (len(tensors) // 2, len(tensors) // 2 + 1)
    assert coverage.unmatched == ("unet.gone.to_q",)


def test_text_encoder_layers_for_a_base_without_that_encoder_are_reported(tmp_path: Path) -> None:
    pipeline = tiny_pipeline("sd15")
    tensors = as_kohya(lora(pipeline), alpha=4) | as_kohya(
        {key.replace("text_encoder.", "text_encoder_2."): value for key, value in with_text(pipeline, seed=0).items()},
        alpha=4,
    )
    coverage = read(tmp_path, tensors).coverage
    assert coverage.layers_matched < coverage.layers_in_file
    assert all(name.startswith("lora_te2_") for name in coverage.unmatched)


def test_adapters_for_several_components_name_them_in_the_loaders_order(tmp_path: Path) -> None:
    tensors = with_text(tiny_pipeline("sdxl"), seed=1)
    adapter = read(tmp_path, dict(reversed(tensors.items())), family="sdxl")
    assert list(adapter.components) == ["unet", "text_encoder", "text_encoder_2"]


@pytest.mark.parametrize("level", ["", "text_model."])
def test_text_encoders_are_found_with_and_without_their_old_level(level: str, tmp_path: Path) -> None:
    tensors = with_text(tiny_pipeline("sd15"), seed=1)
    bare = {key.replace("text_model.", ""): tensor for key, tensor in tensors.items()}
    respelt = {key.replace("text_encoder.", f"text_encoder.{level}"): tensor for key, tensor in bare.items()}
    adapter = read(tmp_path, respelt)
    assert adapter.coverage.layers_matched == adapter.coverage.layers_in_file
    assert "text_encoder" in adapter.components


def test_an_alpha_holds_for_its_own_layer(tmp_path: Path) -> None:
    tensors = as_kohya(lora(tiny_pipeline("sd15")), alpha=lambda name: 2.0 if "attn1" in name else 8.0)
    adapter = read(tmp_path, tensors)
    for _, module, delta in adapter.layers():
        assert isinstance(delta, LowRank)
        assert delta.alpha == (2.0 if "attn1" in module else 8.0)
        assert delta.factor(1.0) == delta.alpha / 4


def test_a_whole_number_alpha_is_read(tmp_path: Path) -> None:
    tensors = as_kohya(lora(tiny_pipeline("sd15")), alpha=2)
    whole = {key: tensor.long() if key.endswith(".alpha") else tensor for key, tensor in tensors.items()}
    assert first_low_rank(read(tmp_path, whole)).alpha == 2.0


def test_a_layer_without_alpha_has_scale_one(tmp_path: Path) -> None:
    tensors = as_kohya(lora(tiny_pipeline("sd15")), alpha=2)
    del tensors[next(key for key in tensors if key.endswith(".alpha"))]
    factors = [delta.factor(1.0) for _, _, delta in read(tmp_path, tensors).layers() if isinstance(delta, LowRank)]
    assert sorted(set(factors)) == [0.5, 1.0]


def test_peft_multiplies_a_requests_scale_by_alpha_before_it_divides() -> None:
    delta = LowRank(torch.zeros(3, 1), torch.zeros(1, 3), alpha=7.0, divisor=3.0)
    assert delta.factor(0.7) == 0.7 * 7.0 / 3.0 != 0.7 * (7.0 / 3.0)


def test_metadata_patterns_are_names_or_ends_of_names(tmp_path: Path) -> None:
    tensors = lora(tiny_pipeline("sd15"))
    exact = stem(tensors).removeprefix("unet.")
    metadata = described(tensors, "unet", r=4, lora_alpha=4, alpha_pattern={f"^{exact}": 1, "attn2.to_k": 2})
    alphas = {module: delta.alpha for _, module, delta in read(tmp_path, tensors, metadata).layers()}  # type: ignore[union-attr]
    assert alphas.pop(exact) == 1.0
    assert all(alpha == (2.0 if name.endswith("attn2.to_k") else 4.0) for name, alpha in alphas.items())


EXPRESSIONS = {r"down_blocks.*attn1\.to_(k|q)": 1, r".*\.to_out\.0": 3}


def test_expressions_in_metadata_mean_what_they_mean_to_peft(tmp_path: Path) -> None:
    tensors = lora(tiny_pipeline("sd15"))
    metadata = described(tensors, "unet", r=4, lora_alpha=4, alpha_pattern=EXPRESSIONS, rank_pattern={".*to_k": 4})
    alphas = {module: delta.alpha for _, module, delta in read(tmp_path, tensors, metadata).layers()}  # type: ignore[union-attr]
    expected = {module: EXPRESSIONS.get(get_pattern_key(EXPRESSIONS, module), 4) for module in alphas}
    assert alphas == expected
    assert set(alphas.values()) == {1, 3, 4}


def test_an_expression_that_others_search_with_for_ever_matches_nothing_at_once(tmp_path: Path) -> None:
    tensors = lora(tiny_pipeline("sd15"))
    metadata = described(tensors, "unet", r=4, lora_alpha=4, alpha_pattern={"([a-z_]+[a-z_.0-9]*)+!": 1})
    assert {delta.alpha for _, _, delta in read(tmp_path, tensors, metadata).layers()} == {4}  # type: ignore[union-attr]


@pytest.mark.parametrize("expression", [r"(?=down).*", r"(a)\1", "x" * 1001 + ".*", "(" * 9])
def test_an_expression_that_cannot_be_read_in_bounded_time_gives_no_alpha(tmp_path: Path, expression: str) -> None:
    tensors = lora(tiny_pipeline("sd15"))
    with pytest.raises(UnsupportedMethod, match="which RE2 does not read"):
        read(tmp_path, tensors, described(tensors, "unet", r=4, lora_alpha=4, alpha_pattern={expression: 2}))
    ranks = described(tensors, "unet", r=8, lora_alpha=4, rank_pattern={expression: 4})
    assert read(tmp_path, tensors, ranks).coverage.ranks == (4, 4)  # the shapes tell them


def test_what_peft_itself_writes_as_metadata_is_read(tmp_path: Path) -> None:
    tensors = lora(tiny_pipeline("sd15"))
    written = LoraConfig(r=4, lora_alpha=2, init_lora_weights="gaussian", target_modules=["to_q", "to_k"]).to_dict()
    written = {key: sorted(value) if isinstance(value, set) else value for key, value in written.items()}
    adapter = read(tmp_path, tensors, {f"unet.{key}": value for key, value in written.items()})
    assert first_low_rank(adapter).factor(1.0) == 0.5


def test_a_one_by_one_kernel_fits_a_linear_layer_and_the_other_way_round(tmp_path: Path) -> None:
    tensors = lora(tiny_pipeline("sd15"), chooses=lambda name, module: name.endswith(("to_q", "proj_in")))
    swapped = {
        key: tensor[:, :, None, None] if tensor.ndim == 2 else tensor.flatten(1) for key, tensor in tensors.items()
    }
    plain, other = read(tmp_path, tensors), read(tmp_path, swapped)
    for (_, _, delta), (_, _, same) in zip(plain.layers(), other.layers(), strict=True):
        assert isinstance(delta, LowRank)
        assert isinstance(same, LowRank)
        assert torch.equal(delta.down, same.down)
        assert torch.equal(delta.up, same.up)


def test_sdxl_blocks_in_the_original_numbering_are_found(tmp_path: Path) -> None:
    """The middle of the tiny UNet, and one block of each side, as kohya numbers SDXL's."""
    names = {
        "middle_block_1_transformer_blocks_1_attn1_to_q": "mid_block.attentions.0.transformer_blocks.1.attn1.to_q",
        "input_blocks_4_1_proj_in": "down_blocks.1.attentions.0.proj_in",
        "output_blocks_0_1_transformer_blocks_0_attn2_to_out_0": (
            "up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0"
        ),
        "input_blocks_4_0_in_layers_2": "down_blocks.1.resnets.0.conv1",
        "input_blocks_4_0_emb_layers_1": "down_blocks.1.resnets.0.time_emb_proj",
    }
    modules = dict(tiny_pipeline("sdxl").unet.named_modules())
    tensors: dict[str, Tensor] = {}
    for spelling, module in names.items():
        weight = modules[module].weight
        tensors[f"lora_unet_{spelling}.lora_down.weight"] = torch.ones(2, *weight.shape[1:])
        tensors[f"lora_unet_{spelling}.lora_up.weight"] = torch.ones(weight.shape[0], 2, *[1] * (weight.ndim - 2))
        tensors[f"lora_unet_{spelling}.alpha"] = torch.tensor(1.0)
    adapter = read(tmp_path, tensors, family="sdxl")
    assert set(adapter.components["unet"]) == set(names.values())
    assert {delta.factor(1.0) for _, _, delta in adapter.layers() if isinstance(delta, LowRank)} == {0.5}


def test_one_odd_kohya_name_does_not_hide_the_others(tmp_path: Path) -> None:
    weight = torch.ones(4, 64)
    stems = ["lora_unet_middle_block_1_proj_in", "lora_unet_middle_block_99_proj_in"]
    tensors = {f"{name}.lora_down.weight": weight.clone() for name in stems}
    tensors |= {f"{name}.lora_up.weight": weight.T.clone() for name in stems}
    adapter = read(tmp_path, tensors, family="sdxl")
    assert list(adapter.components["unet"]) == ["mid_block.attentions.0.proj_in"]
    assert adapter.coverage.unmatched == ("lora_unet_middle_block_99_proj_in",)


def test_what_the_flux_converter_leaves_out_is_reported(tmp_path: Path) -> None:
    pipeline = tiny_pipeline("flux")
    stem_name = "lora_unet_double_blocks_0_img_attn_proj"
    tensors = {f"{stem_name}.lora_down.weight": torch.ones(4, 64), f"{stem_name}.lora_up.weight": torch.ones(64, 4)}
    lost = "lora_te1_text_projection"
    tensors |= {f"{lost}.lora_down.weight": torch.ones(4, 32), f"{lost}.lora_up.weight": torch.ones(32, 4)}
    path = put(tmp_path, "adapter", Form(tensors))
    coverage = parse_adapter(path, "owner/adapter", manifest_of(pipeline), LIMITS).coverage
    assert (coverage.layers_matched, coverage.unmatched) == (1, (lost,))


def test_kohya_dora_equals_pefts_dora(tmp_path: Path) -> None:
    """diffusers drops kohya's magnitudes with a warning."""
    tensors = lora(tiny_pipeline("sd15"), chooses=everything, dora=True)
    for (_, _, delta), (_, _, same) in zip(
        read(tmp_path, tensors).layers(), read(tmp_path, as_kohya(tensors)).layers(), strict=True
    ):
        assert isinstance(delta, Dora)
        assert isinstance(same, Dora)
        assert torch.equal(delta.magnitude, same.magnitude)
        assert torch.equal(delta.direction.down, same.direction.down)


def test_loha_is_the_scaled_product_of_two_low_rank_products(tmp_path: Path) -> None:
    pipeline = tiny_pipeline("sd15")
    tensors = loha(pipeline, rank=4, chooses=everything)
    for _, module, delta in read(tmp_path, tensors).layers():
        assert isinstance(delta, Hadamard)
        key = "lora_unet_" + module.replace(".", "_")
        w1_a, w1_b, w2_a, w2_b = (tensors[f"{key}.hada_{part}"].double() for part in ("w1_a", "w1_b", "w2_a", "w2_b"))
        weight = pipeline.unet.get_submodule(module).weight
        expected = 0.7 * 0.5 * ((w1_a @ w1_b) * (w2_a @ w2_b)).reshape(weight.shape)
        torch.testing.assert_close(weight_delta(delta, weight, 0.7).double(), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("rank", [None, 2])
def test_lokr_is_the_kronecker_product_and_scaled_only_if_decomposed(rank: int | None, tmp_path: Path) -> None:
    pipeline = tiny_pipeline("sd15")
    tensors = lokr(pipeline, rank=rank, chooses=lambda name, module: "attentions" in name)
    for _, module, delta in read(tmp_path, tensors).layers():
        assert isinstance(delta, Kronecker)
        key = "lora_unet_" + module.replace(".", "_")
        weight = pipeline.unet.get_submodule(module).weight
        right = (
            tensors[f"{key}.lokr_w2"].double()
            if rank is None
            else tensors[f"{key}.lokr_w2_a"].double() @ tensors[f"{key}.lokr_w2_b"].double()
        )
        expected = torch.kron(tensors[f"{key}.lokr_w1"].double(), right.flatten(1)).reshape(weight.shape)
        torch.testing.assert_close(weight_delta(delta, weight, 0.7).double(), 0.7 * expected, rtol=1e-4, atol=1e-6)


def test_a_convolutions_core_is_folded_into_its_factors(tmp_path: Path) -> None:
    weight = tiny_pipeline("sd15").unet.get_submodule("down_blocks.0.resnets.0.conv1").weight
    out, inputs = weight.shape[:2]
    key, random = "lora_unet_down_blocks_0_resnets_0_conv1", torch.Generator().manual_seed(0)
    down, core, up = (
        torch.randn(*shape, generator=random) for shape in ((3, inputs, 1, 1), (2, 3, 3, 3), (out, 2, 1, 1))
    )
    tensors = {f"{key}.lora_down.weight": down, f"{key}.lora_mid.weight": core, f"{key}.lora_up.weight": up}
    delta = first_low_rank(read(tmp_path, tensors))
    expected = torch.einsum("orhw,rqkl,qipj->oikl", up, core, down)
    torch.testing.assert_close(weight_delta(delta, weight, 1.0), expected, rtol=1e-4, atol=1e-5)


def test_changes_that_are_all_zeros_are_left_out_where_their_method_is_not_served(tmp_path: Path) -> None:
    tensors = as_kohya(lora(tiny_pipeline("sd15")), alpha=4)
    zeros = {key.replace(".alpha", ".diff_b"): torch.zeros(32) for key in tensors if key.endswith(".alpha")}
    assert read(tmp_path, tensors | zeros).coverage == read(tmp_path, tensors).coverage


def test_the_rank_limit_is_the_configurations(tmp_path: Path) -> None:
    tensors = lora(tiny_pipeline("sd15"), rank=9)
    read(tmp_path, tensors, limits=AdapterLimits(max_rank=9))
    with pytest.raises(RankTooHigh, match="rank 9; the limit is 8"):
        read(tmp_path, tensors, limits=AdapterLimits(max_rank=8))


def test_the_size_limits_are_the_configurations(tmp_path: Path) -> None:
    tensors = lora(tiny_pipeline("sd15"))
    with pytest.raises(RefusedAdapter, match=f"{len(tensors)} tensors, over the limit of 3"):
        read(tmp_path, tensors, limits=AdapterLimits(max_tensors=3))
    with pytest.raises(RefusedAdapter, match="over the limit of 1.0KiB"):
        read(tmp_path, tensors, limits=AdapterLimits(max_file=1024))  # type: ignore[arg-type]


def test_values_that_fit_the_file_but_not_the_bases_dtype_are_refused(tmp_path: Path) -> None:
    tensors = lora(tiny_pipeline("sd15"), dtype=torch.bfloat16)
    tensors = {key: tensor * 1e6 if "lora_A" in key else tensor for key, tensor in tensors.items()}
    with pytest.raises(NonFinite):
        read(tmp_path, tensors, dtype=torch.float16)


def test_large_factors_whose_product_is_small_are_read(tmp_path: Path) -> None:
    tensors = lora(tiny_pipeline("sd15"), dtype=torch.float32)
    lopsided = {key: tensor * (1e5 if "lora_A" in key else 1e-5) for key, tensor in tensors.items()}
    assert read(tmp_path, lopsided).coverage.layers_matched == len(tensors) // 2


def test_a_name_from_a_file_is_made_fit_to_show(tmp_path: Path) -> None:
    odd = "unet.\x1b[31m" + "x" * 300 + ".lora_A.weight"
    (name,) = read(tmp_path, lora(tiny_pipeline("sd15")) | {odd + ".strange": torch.ones(1)}).coverage.unmatched
    assert name.startswith("unet.?[31m")
    assert name.isprintable()
    assert len(name) <= 100
